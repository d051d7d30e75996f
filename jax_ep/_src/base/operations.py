"""The operations, one row each. Other lists of operations are derived from this one."""

from typing import NamedTuple


class Operation(NamedTuple):
    """One public operation.

    Attributes:
      name: name of the public function; errors use it, too.
      checkpoint_name: name of its results for jax.ad_checkpoint.checkpoint_name; None: nothing
        crosses between ranks.
      has_algorithms: whether a table says which algorithm carries it.
      has_levels: whether it runs inside and between the nodes of a group with several.
    """

    name: str
    checkpoint_name: str | None
    has_algorithms: bool = False
    has_levels: bool = False

    @property
    def is_local(self) -> bool:
        """Returns whether a rank computes the operation without the other ranks."""
        return self.checkpoint_name is None


DISPATCH_NAME = "jax_ep_dispatch"
COMBINE_NAME = "jax_ep_combine"
REDUCE_NAME = "jax_ep_all_reduce"
RAGGED_NAME = "jax_ep_ragged_all_to_all"

OPERATIONS = (
    Operation("dispatch", DISPATCH_NAME, has_levels=True),
    Operation("dispatch_fp8", DISPATCH_NAME, has_levels=True),
    Operation("low_latency_dispatch", DISPATCH_NAME),
    Operation("low_latency_dispatch_send", DISPATCH_NAME),
    Operation("low_latency_dispatch_recv", DISPATCH_NAME),
    Operation("combine", COMBINE_NAME, has_levels=True),
    Operation("combine_weights", COMBINE_NAME, has_levels=True),
    Operation("low_latency_combine", COMBINE_NAME),
    Operation("low_latency_combine_send", COMBINE_NAME),
    Operation("low_latency_combine_recv", COMBINE_NAME),
    Operation("get_dispatch_layout", None),
    Operation("ragged_all_to_all", RAGGED_NAME),
    Operation("all_to_all_v", RAGGED_NAME),
    Operation("all_reduce", REDUCE_NAME, has_algorithms=True),
    Operation("reduce_scatter", REDUCE_NAME, has_algorithms=True),
    Operation("all_gather", REDUCE_NAME, has_algorithms=True),
    Operation("all_reduce_residual_rmsnorm", REDUCE_NAME, has_algorithms=True),
)
