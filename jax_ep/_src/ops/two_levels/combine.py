"""combine of a group with several nodes."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jax_ep._src.base.options import Layout
from jax_ep._src.base.spec import RouteSpec, RowIndex
from jax_ep._src.ops.combine import call
from jax_ep._src.ops.two_levels.nodes import Nodes
from jax_ep._src.ops.two_levels.parts import in_node, nodes_of
from jax_ep._src.ops.two_levels.transport import Transport, transport_of


def combine(
    spec: RouteSpec,
    index: RowIndex,
    rows: jax.Array,
    weights: jax.Array | None,
    biases: Sequence[jax.Array],
) -> jax.Array:
    """Returns [num_tokens, hidden]; in two levels if the group has several nodes.

    Each node adds its rows of a token as the flat operation adds all of them, and rounds the sum to
    the rows' dtype. These sums cross, and the source adds them.
    """
    if not spec.is_split:
        return call.combine(spec, index, rows, weights, biases)
    nodes, transport = nodes_of(spec.group), transport_of(spec, spec.routes.combine)
    within = _places_in_node(nodes, transport, spec, index)
    sums = call.combine(in_node(spec), within, rows, weights, ())
    partials = sums.reshape(nodes.num_nodes, -1, rows.shape[1])
    return transport.add(partials, nodes.has_rows(index.send_rank, index.send_row), biases)


def _places_in_node(
    nodes: Nodes, transport: Transport, spec: RouteSpec, index: RowIndex
) -> RowIndex:
    """Returns the places in this node of the rows of all tokens of the rail, [N * T, slots]."""
    num_tokens, num_slots = index.send_row.shape
    recv_src = nodes.at_forwarders(index.recv_src, num_tokens)
    if spec.layout is Layout.RANK:
        send_row = transport.cross(nodes.columns_by_node(index.send_row))
        send_row = send_row.reshape(-1, nodes.ranks_per_node)
        return RowIndex(None, send_row, recv_src, None)
    assert index.send_rank is not None
    both = jnp.concatenate([index.send_rank, index.send_row], axis=1)
    send_rank, send_row = jnp.split(transport.cross(both[None]), 2, axis=2)
    own = nodes.choices_in_node(send_rank, send_row, transport.call.group.rank())
    send_rank, send_row = (a.reshape(-1, num_slots) for a in own)
    return RowIndex(send_rank, send_row, recv_src, index.recv_k)
