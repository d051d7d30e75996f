"""dispatch from XLA's collectives; runs on every platform of JAX.

Every rank gathers the routing of all ranks and computes the whole plan. Rows travel by all_gather.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp

from jax_ep._src.base.options import Layout
from jax_ep._src.base.spec import DispatchResults, DispatchSpec
from jax_ep._src.ops.common.check_mesh import check_mesh
from jax_ep._src.ops.common.tokens import (
    count,
    gather_tokens,
    invert,
    own_tokens,
    places_of_parts,
    take,
)
from jax_ep._src.ops.pull_rows.stock import pull_rows


def dispatch(
    spec: DispatchSpec,
    topk_idx: jax.Array,
    topk_weights: jax.Array | None,
    rows: Sequence[jax.Array],
    *,
    num_parts: int = 1,
) -> DispatchResults:
    """Returns the routing and the rows of this rank. `num_parts`: as in the custom call."""
    routed = _route(spec, topk_idx, topk_weights, num_parts)
    index = places_of_parts(
        routed.recv_src,
        topk_idx.shape[0] // num_parts,
        num_ranks=spec.group.num_ranks,
        num_parts=num_parts,
    )
    return routed._replace(rows=tuple(pull_rows(spec, index, r) for r in rows))


def _route(
    spec: DispatchSpec, topk_idx: jax.Array, topk_weights: jax.Array | None, num_parts: int
) -> DispatchResults:
    """Returns the routing of this rank, without rows."""
    topk_idx = check_mesh(topk_idx, spec.group, op=spec.op)
    is_expert = (topk_idx >= 0) & (topk_idx < spec.num_experts)
    num_invalid = jnp.sum((topk_idx != -1) & ~is_expert, dtype=jnp.int32)[None]
    all_of = partial(gather_tokens, spec.group, num_parts=num_parts)
    ids = all_of(jnp.where(is_expert, topk_idx, -1))
    weights = None if topk_weights is None else all_of(topk_weights)
    by_layout = _route_ranks if spec.layout is Layout.RANK else _route_experts
    routed = by_layout(spec, ids, weights)
    own = own_tokens(spec.group, routed.send_row, num_parts=num_parts)
    return routed._replace(send_row=own, num_invalid=num_invalid)


def _route_ranks(
    spec: DispatchSpec, ids: jax.Array, topk_weights: jax.Array | None
) -> DispatchResults:
    """Routes the tokens of all sources. `send_row` has the rows of all of them."""
    group, num_local, capacity = spec.group, spec.num_local_experts, spec.recv_capacity
    rank = group.rank()
    ranks = jnp.arange(group.num_ranks, dtype=jnp.int32)[None, None, :]
    wanted = jnp.any(_rank_of(ids, num_local)[:, :, None] == ranks, axis=1)  # [tokens, ranks]
    row = jnp.cumsum(wanted, axis=0, dtype=jnp.int32) - 1
    row = jnp.where(wanted & (row < capacity), row, -1)
    recv_src = invert(row[:, rank], capacity)
    recv_ids = take(ids, recv_src, fill=-1)
    is_here = (recv_ids >= 0) & (recv_ids // num_local == rank)
    local = jnp.where(is_here, recv_ids % num_local, -1)
    weights = None
    if topk_weights is not None:
        weights = jnp.where(is_here, take(topk_weights, recv_src), 0.0)
    num_wanted = jnp.sum(wanted[:, rank], dtype=jnp.int32)
    num_recv = jnp.minimum(num_wanted, capacity)
    return DispatchResults(
        group_sizes=count(local, num_local),
        num_recv=num_recv[None],
        num_dropped=(num_wanted - num_recv)[None],
        num_invalid=jnp.zeros((1,), jnp.int32),
        recv_src=recv_src,
        recv_k=None,
        send_row=row,
        recv_topk_idx=local,
        recv_weights=weights,
        rows=(),
    )


def _route_experts(
    spec: DispatchSpec, ids: jax.Array, topk_weights: jax.Array | None
) -> DispatchResults:
    """Routes the tokens of all sources. `send_row` has the rows of all of them."""
    group, num_local, capacity = spec.group, spec.num_local_experts, spec.recv_capacity
    num_all, num_topk = ids.shape
    rank = group.rank()
    experts = jnp.arange(spec.num_experts, dtype=jnp.int32)[None, None, :]
    chosen = jnp.sum(ids[:, :, None] == experts, axis=1, dtype=jnp.int32)  # [tokens, experts]
    upto = jnp.cumsum(chosen, axis=0, dtype=jnp.int32)

    # Aligned sizes only grow along the tokens, so the tokens that fit are a prefix.
    aligned = -(-upto // spec.expert_alignment) * spec.expert_alignment
    aligned = aligned.reshape(num_all, group.num_ranks, num_local)
    per_rank = jnp.sum(aligned, axis=-1, dtype=jnp.int32)
    is_whole = per_rank <= capacity
    if spec.expert_stride:
        is_whole &= jnp.all(aligned <= spec.expert_stride, axis=-1)
    fits = jnp.repeat(is_whole, num_local, axis=1)  # [tokens, experts]
    kept = jnp.max(jnp.where(fits, upto, 0), axis=0)
    sizes = (-(-kept // spec.expert_alignment) * spec.expert_alignment).reshape(-1, num_local)
    if spec.expert_stride:
        first = jnp.arange(spec.num_experts, dtype=jnp.int32) % num_local * spec.expert_stride
    else:
        first = (jnp.cumsum(sizes, axis=1, dtype=jnp.int32) - sizes).reshape(-1)

    safe = jnp.maximum(ids, 0)
    earlier = jnp.tri(num_topk, k=-1, dtype=jnp.bool_)[None]
    same = (ids[:, :, None] == ids[:, None, :]) & earlier
    before = jnp.take_along_axis(upto - chosen, safe, axis=1) + jnp.sum(
        same, axis=-1, dtype=jnp.int32
    )
    is_kept = (ids >= 0) & jnp.take_along_axis(fits, safe, axis=1)
    row = jnp.where(is_kept, first[safe] + before, -1)

    is_here = _rank_of(ids, num_local) == rank
    choice = invert(jnp.where(is_here, row, -1).reshape(-1), capacity)  # token * K + k
    weights = None
    if topk_weights is not None:
        weights = take(topk_weights.reshape(-1), choice)
    group_sizes = sizes[rank]
    num_wanted = jnp.sum(is_here, dtype=jnp.int32)
    num_kept = jnp.sum(is_here & is_kept, dtype=jnp.int32)
    return DispatchResults(
        group_sizes=group_sizes,
        num_recv=jnp.sum(group_sizes, dtype=jnp.int32)[None],
        num_dropped=(num_wanted - num_kept)[None],
        num_invalid=jnp.zeros((1,), jnp.int32),
        recv_src=jnp.where(choice >= 0, choice // num_topk, -1),
        recv_k=jnp.where(choice >= 0, choice % num_topk, -1),
        send_row=row,
        recv_topk_idx=None,
        recv_weights=weights,
        rows=(),
    )


def _rank_of(ids: jax.Array, num_local_experts: int) -> jax.Array:
    return jnp.where(ids >= 0, ids // num_local_experts, -1)
