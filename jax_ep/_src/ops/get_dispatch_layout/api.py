"""get_dispatch_layout: counts the tokens that this rank is going to send."""

from dataclasses import dataclass

import jax

from jax_ep._src.base import jax_compat
from jax_ep._src.base.options import BackendName
from jax_ep._src.group.group import Group
from jax_ep._src.ops.common.checks import Checks
from jax_ep._src.ops.get_dispatch_layout import call

_check = Checks("get_dispatch_layout")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DispatchLayout:
    """Counts of one rank's routing. A pytree.

    Attributes:
      num_tokens_per_rank: [num_ranks] int32; a token counts once per rank.
      num_tokens_per_node: [num_ranks / ranks_per_node] int32; a token counts once per node.
      num_tokens_per_expert: [num_experts] int32.
      is_token_in_rank: [num_tokens, num_ranks] bool.
    """

    num_tokens_per_rank: jax.Array
    num_tokens_per_node: jax.Array
    num_tokens_per_expert: jax.Array
    is_token_in_rank: jax.Array


def get_dispatch_layout(
    topk_idx: jax.Array, *, num_experts: int, group: Group, backend: BackendName | None = None
) -> DispatchLayout:
    """Counts the tokens that go to each rank, node and expert.

    Args:
      topk_idx: [num_tokens, num_topk] int32 or int64. Global expert ids; -1 sends nothing. Other
        ids outside [0, num_experts) are ignored.
      num_experts: experts of the whole group, a multiple of its ranks.
      group: the ranks.
      backend: None (the group's), "cpu", "cuda" (GPU groups) or "xla".

    Returns:
      DispatchLayout.

    Collective: no, but call it inside jax.shard_map over the group's mesh. The order of the mesh's
      devices does not matter here, and is not checked.
    Gradient: none, because the results are integers.
    Raises: ShapeError, DTypeError, ConfigError, GroupError while tracing; RoutingError from
      `group.check()` in debug mode.
    Source: DeepEP (DeepSeek, 2025), get_dispatch_layout.
    """
    _check.group(group)
    num_experts = _check.num_experts(num_experts, group)
    backend = _check.backend(backend, group)
    topk_idx = _check.topk_idx(topk_idx, num_experts=num_experts)
    (topk_idx,) = jax_compat.vary_alike([topk_idx], group.axes)
    _check.report_bad_routing(topk_idx, num_experts=num_experts, group=group)
    num_nodes = group.num_ranks // group.ranks_per_node
    counts = call.get_dispatch_layout(
        topk_idx,
        num_ranks=group.num_ranks,
        num_nodes=num_nodes,
        num_experts=num_experts,
        backend=backend,
    )
    return DispatchLayout(*counts)
