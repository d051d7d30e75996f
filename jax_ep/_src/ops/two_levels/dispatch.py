"""dispatch of a group with several nodes."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp

from jax_ep._src.base.options import Layout
from jax_ep._src.base.spec import DispatchResults, DispatchSpec
from jax_ep._src.ops.dispatch import call
from jax_ep._src.ops.two_levels.parts import in_node, nodes_of
from jax_ep._src.ops.two_levels.transport import transport_of


def dispatch(
    spec: DispatchSpec,
    topk_idx: jax.Array,
    topk_weights: jax.Array | None,
    rows: Sequence[jax.Array],
    rank_mask: jax.Array | None = None,
) -> DispatchResults:
    """Routes the tokens and moves their rows; in two levels if the group has several nodes.

    The results are those of the flat operation, to the bit.
    """
    if not spec.is_split:
        return call.dispatch(spec, topk_idx, topk_weights, rows, rank_mask)
    nodes, transport = nodes_of(spec.group), transport_of(spec, spec.routes.dispatch)
    node = transport.call.group.rank()
    num_tokens = topk_idx.shape[0]

    # Every forwarder learns the routing of its rail, and takes the rows that its node needs.
    ids, weights = _cross_routing(transport.cross, topk_idx, topk_weights)
    ids = nodes.experts_in_node(ids, node, spec.num_experts)
    takes = jnp.any(ids >= 0, axis=2)
    crossed = [transport.cross(r[None], takes) for r in rows]

    # Sources count by (node, rank in it), which is their rank in the whole group.
    routed = call.dispatch(
        replace(in_node(spec), num_experts=spec.num_experts // nodes.num_nodes),
        _joined(ids),
        None if weights is None else _joined(weights),
        [_joined(r) for r in crossed],
        num_parts=nodes.num_nodes,
    )

    # The sources learn the places of their tokens.
    by_node = transport.cross(routed.send_row.reshape(nodes.num_nodes, num_tokens, -1))
    if spec.layout is Layout.RANK:
        send_row = nodes.columns_of_ranks(by_node)
    else:
        send_row = jnp.max(by_node, axis=0)  # a choice has a row in one node, and -1 in the others
    is_expert = (topk_idx >= 0) & (topk_idx < spec.num_experts)
    num_invalid = jnp.sum((topk_idx != -1) & ~is_expert, dtype=jnp.int32)[None]
    return routed._replace(send_row=send_row, num_invalid=num_invalid)


def _cross_routing(
    cross: Callable[[jax.Array], jax.Array], topk_idx: jax.Array, topk_weights: jax.Array | None
) -> tuple[jax.Array, jax.Array | None]:
    """Returns ids and weights [N, T, K] of the rail; they cross as one array."""
    if topk_weights is None:
        return cross(topk_idx[None]), None
    bits = jax.lax.bitcast_convert_type(topk_weights, jnp.int32)
    ids, bits = jnp.split(cross(jnp.concatenate([topk_idx, bits], axis=1)[None]), 2, axis=2)
    return ids, jax.lax.bitcast_convert_type(bits, jnp.float32)


def _joined(parts: jax.Array) -> jax.Array:
    return parts.reshape(-1, *parts.shape[2:])
