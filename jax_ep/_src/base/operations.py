"""The operations, a row each. Other lists of them are derived from this one."""

from typing import NamedTuple


class Operation(NamedTuple):
    """One public operation.

    Attributes:
      name: as callers write it, and as errors name it.
      checkpoint_name: what jax.ad_checkpoint.checkpoint_name calls its results; None: nothing
        crosses between ranks.
      has_algorithms: whether a table says which algorithm carries it.
    """

    name: str
    checkpoint_name: str | None
    has_algorithms: bool = False

    @property
    def is_local(self) -> bool:
        """Whether a rank computes it without the others."""
        return self.checkpoint_name is None


DISPATCH_NAME = "jax_ep_dispatch"
COMBINE_NAME = "jax_ep_combine"
REDUCE_NAME = "jax_ep_all_reduce"

OPERATIONS = (
    Operation("dispatch", DISPATCH_NAME),
    Operation("dispatch_fp8", DISPATCH_NAME),
    Operation("combine", COMBINE_NAME),
    Operation("combine_weights", COMBINE_NAME),
    Operation("get_dispatch_layout", None),
    Operation("all_reduce", REDUCE_NAME, has_algorithms=True),
    Operation("reduce_scatter", REDUCE_NAME, has_algorithms=True),
    Operation("all_gather", REDUCE_NAME, has_algorithms=True),
    Operation("all_reduce_residual_rmsnorm", REDUCE_NAME, has_algorithms=True),
)
