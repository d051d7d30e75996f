"""pull_rows of a group with several nodes: along the routing of a dispatch, and back."""

import jax
import jax.numpy as jnp

from jax_ep._src.base.spec import ExchangeSpec, RowIndex
from jax_ep._src.ops.pull_rows import call
from jax_ep._src.ops.two_levels.parts import in_node, nodes_of
from jax_ep._src.ops.two_levels.transport import transport_of


def pull_along(spec: ExchangeSpec, index: RowIndex, rows: jax.Array) -> jax.Array:
    """Sends each token's row along the routing of a dispatch: [recv_capacity, ...].

    In two levels, rows of tokens without a row in a node do not cross to it.
    """
    if not spec.is_split:
        return call.pull_along(spec, index, rows)
    nodes, transport = nodes_of(spec.group), transport_of(spec, spec.routes.cached_dispatch)
    wanted = nodes.has_rows(index.send_rank, index.send_row).astype(jnp.int32)
    takes = transport.cross(wanted[..., None])[..., 0] > 0
    crossed = transport.cross(rows[None], takes)
    num_tokens, num_topk = index.send_row.shape
    return call.pull_rows(
        in_node(spec.to_route()).to_pull(),
        nodes.at_forwarders(index.recv_src, num_tokens),
        crossed.reshape(-1, *rows.shape[1:]),
        slot=index.recv_k,
        num_slots=num_topk,
    )


def pull_to_rows(spec: ExchangeSpec, index: jax.Array, numbers: jax.Array) -> jax.Array:
    """Sends numbers [M, 1] of the choices of each rank to the rows of a dispatch.

    `index`: [recv_capacity] int32, rank * M + place of each row's number; -1 gives zero.
    """
    if not spec.is_split:
        return call.pull_rows(spec.to_pull(), index, numbers)
    nodes, transport = nodes_of(spec.group), transport_of(spec, spec.routes.cached_dispatch)
    crossed = transport.cross(numbers[None])
    return call.pull_rows(
        in_node(spec.to_route()).to_pull(),
        nodes.at_forwarders(index, numbers.shape[0]),
        crossed.reshape(-1, *numbers.shape[1:]),
    )


def pull_to_tokens(spec: ExchangeSpec, index: jax.Array, numbers: jax.Array) -> jax.Array:
    """Brings numbers [M, 1] at the rows of a dispatch back to the choices of each rank.

    `index`: [I] int32, rank * M + place of each choice's number; -1 gives zero. In two levels the
    index crosses to the forwarders, which pull the numbers inside their nodes.
    """
    if not spec.is_split:
        return call.pull_rows(spec.to_pull(), index, numbers)
    nodes, transport = nodes_of(spec.group), transport_of(spec, spec.routes.cached_dispatch)
    size = numbers.shape[0]
    wanted = transport.cross(index[None, :, None])[..., 0]
    found = call.pull_rows(
        in_node(spec.to_route()).to_pull(),
        nodes.in_node(wanted, size, transport.call.group.rank()).reshape(-1),
        numbers,
    )
    by_node = transport.cross(found.reshape(nodes.num_nodes, -1, *numbers.shape[1:]))
    node = nodes.node_of(index, size)
    chosen = jnp.take_along_axis(by_node, jnp.maximum(node, 0)[None, :, None], axis=0)[0]
    return jnp.where(node[:, None] >= 0, chosen, jnp.zeros((), chosen.dtype))
