"""get_dispatch_layout: what this rank is going to send."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jax_ep import _checks, _jax_compat
from jax_ep._primitives.get_dispatch_layout import get_dispatch_layout as custom_call
from jax_ep.group import Group

_OP = "get_dispatch_layout"


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
    topk_idx: jax.Array, *, num_experts: int, group: Group, backend: str | None = None
) -> DispatchLayout:
    """Counts the tokens that go to each rank, node and expert.

    Args:
      topk_idx: [num_tokens, num_topk] int32 or int64. Global expert ids; -1 sends nothing, other
        ids outside [0, num_experts) are ignored.
      num_experts: experts of the whole group, a multiple of its ranks.
      group: the ranks.
      backend: None (the group's), "cpu", "cuda" (GPU groups) or "xla".

    Returns:
      DispatchLayout.

    Collective: no, but inside jax.shard_map over the group's mesh. The order of its devices does
      not matter here, and is not checked.
    Gradient: none, the results are integers.
    Raises: ShapeError, DTypeError, ConfigError, GroupError while tracing; RoutingError from
      `group.check()` in debug mode.
    Source: DeepEP (DeepSeek, 2025), get_dispatch_layout.
    """
    _checks.require_group(group, op=_OP)
    num_experts = _checks.require_num_experts(num_experts, group, op=_OP)
    backend = _checks.require_backend(backend, group, op=_OP)
    topk_idx = _checks.require_topk_idx(topk_idx, num_experts=num_experts, op=_OP)
    (topk_idx,) = _jax_compat.vary_alike([topk_idx], group.axes)
    _checks.report_bad_routing(topk_idx, num_experts=num_experts, group=group, op=_OP)
    num_nodes = group.num_ranks // group.ranks_per_node
    count = _stock if backend == "xla" else custom_call
    return DispatchLayout(
        *count(topk_idx, num_ranks=group.num_ranks, num_nodes=num_nodes, num_experts=num_experts)
    )


def _stock(
    topk_idx: jax.Array, *, num_ranks: int, num_nodes: int, num_experts: int
) -> tuple[jax.Array, ...]:
    is_expert = (topk_idx >= 0) & (topk_idx < num_experts)
    ids = jnp.where(is_expert, topk_idx, num_experts)
    experts = jnp.arange(num_experts, dtype=jnp.int32)[None, None, :]
    per_expert = jnp.sum(ids[:, :, None] == experts, axis=(0, 1), dtype=jnp.int32)
    rank = ids // (num_experts // num_ranks)
    ranks = jnp.arange(num_ranks, dtype=jnp.int32)[None, None, :]
    in_rank = jnp.any(rank[:, :, None] == ranks, axis=1)
    in_node = jnp.any(in_rank.reshape(-1, num_nodes, num_ranks // num_nodes), axis=-1)
    return (
        jnp.sum(in_rank, axis=0, dtype=jnp.int32),
        jnp.sum(in_node, axis=0, dtype=jnp.int32),
        per_expert,
        in_rank,
    )
