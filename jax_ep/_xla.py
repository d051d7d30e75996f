"""The `xla` back end: the same results from stock collectives, wherever JAX runs.

Every rank gathers the routing of all ranks and computes the whole plan; rows travel by all_gather,
partial sums by all_to_all. Sums are written out one by one, so their order is ours.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jax_ep import _exact
from jax_ep._primitives.check_mesh import check_mesh
from jax_ep._spec import CallSpec, CombineSpec, DispatchSpec, GroupSpec, Routed, RowIndex
from jax_ep.config import Layout


def dispatch(
    spec: DispatchSpec,
    topk_idx: jax.Array,
    topk_weights: jax.Array | None,
    rows: Sequence[jax.Array],
) -> Routed:
    """The routing and the rows of this rank; the contract of `Routed`."""
    topk_idx = check_mesh(topk_idx, spec.group, op=spec.op)
    is_expert = (topk_idx >= 0) & (topk_idx < spec.num_experts)
    num_invalid = jnp.sum((topk_idx != -1) & ~is_expert, dtype=jnp.int32)[None]
    ids = _gather_tokens(spec.group, jnp.where(is_expert, topk_idx, -1))
    route = _route_ranks if spec.layout is Layout.RANK else _route_experts
    routed = route(spec, ids, num_invalid, topk_weights)
    return routed._replace(
        rows=tuple(pull_rows(spec, routed.recv_src, r) for r in rows),
    )


def _route_ranks(
    spec: DispatchSpec, ids: jax.Array, num_invalid: jax.Array, topk_weights: jax.Array | None
) -> Routed:
    group, num_local, capacity = spec.group, spec.num_local_experts, spec.recv_capacity
    rank = jax.lax.axis_index(group.axes)
    ranks = jnp.arange(group.num_ranks, dtype=jnp.int32)[None, None, :]
    wanted = jnp.any(_rank_of(ids, num_local)[:, :, None] == ranks, axis=1)  # [tokens, ranks]
    row = jnp.cumsum(wanted, axis=0, dtype=jnp.int32) - 1
    row = jnp.where(wanted & (row < capacity), row, -1)
    recv_src = _invert(row[:, rank], capacity)
    recv_ids = _take(ids, recv_src, fill=-1)
    is_here = (recv_ids >= 0) & (recv_ids // num_local == rank)
    local = jnp.where(is_here, recv_ids % num_local, -1)
    weights = None
    if topk_weights is not None:
        all_weights = _take(_gather_tokens(group, topk_weights), recv_src)
        weights = jnp.where(is_here, all_weights, 0.0)
    num_wanted = jnp.sum(wanted[:, rank], dtype=jnp.int32)
    num_recv = jnp.minimum(num_wanted, capacity)
    return Routed(
        group_sizes=_count(local, num_local),
        num_recv=num_recv[None],
        num_dropped=(num_wanted - num_recv)[None],
        num_invalid=num_invalid,
        recv_src=recv_src,
        recv_k=None,
        send_row=_own(group, row),
        recv_topk_idx=local,
        recv_weights=weights,
        rows=(),
    )


def _route_experts(
    spec: DispatchSpec, ids: jax.Array, num_invalid: jax.Array, topk_weights: jax.Array | None
) -> Routed:
    group, num_local, capacity = spec.group, spec.num_local_experts, spec.recv_capacity
    num_all, num_topk = ids.shape
    rank = jax.lax.axis_index(group.axes)
    experts = jnp.arange(spec.num_experts, dtype=jnp.int32)[None, None, :]
    chosen = jnp.sum(ids[:, :, None] == experts, axis=1, dtype=jnp.int32)  # [tokens, experts]
    upto = jnp.cumsum(chosen, axis=0, dtype=jnp.int32)

    # Aligned sizes only grow along the tokens, so "fits" is a prefix of whole tokens.
    aligned = -(-upto // spec.expert_alignment) * spec.expert_alignment
    aligned = aligned.reshape(num_all, group.num_ranks, num_local)
    per_rank = jnp.sum(aligned, axis=-1, dtype=jnp.int32)
    fits = jnp.repeat(per_rank <= capacity, num_local, axis=1)  # [tokens, experts]
    kept = jnp.max(jnp.where(fits, upto, 0), axis=0)
    sizes = (-(-kept // spec.expert_alignment) * spec.expert_alignment).reshape(-1, num_local)
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
    choice = _invert(jnp.where(is_here, row, -1).reshape(-1), capacity)  # token * K + k
    weights = None
    if topk_weights is not None:
        weights = _take(_gather_tokens(group, topk_weights).reshape(-1), choice)
    group_sizes = sizes[rank]
    num_wanted = jnp.sum(is_here, dtype=jnp.int32)
    num_kept = jnp.sum(is_here & is_kept, dtype=jnp.int32)
    return Routed(
        group_sizes=group_sizes,
        num_recv=jnp.sum(group_sizes, dtype=jnp.int32)[None],
        num_dropped=(num_wanted - num_kept)[None],
        num_invalid=num_invalid,
        recv_src=jnp.where(choice >= 0, choice // num_topk, -1),
        recv_k=jnp.where(choice >= 0, choice % num_topk, -1),
        send_row=_own(group, row),
        recv_topk_idx=None,
        recv_weights=weights,
        rows=(),
    )


def pull_rows(
    spec: CallSpec | DispatchSpec,
    index: jax.Array,
    rows: jax.Array,
    *,
    slot: jax.Array | None = None,
    num_slots: int = 0,
) -> jax.Array:
    """Rows of the peers' arrays, [N, ...]; the contract of the custom call. Needs no slots."""
    rows = check_mesh(rows, spec.group, op=spec.op)
    # As integers: XLA:CPU selects fp8 through a wider type, which changes the bits of a NaN.
    is_float = jnp.issubdtype(rows.dtype, jnp.floating)
    carrier = jnp.dtype(f"uint{8 * rows.dtype.itemsize}") if is_float else rows.dtype
    bits = jax.lax.bitcast_convert_type(rows, carrier) if is_float else rows
    taken = _take(_gather_tokens(spec.group, bits), index)
    return jax.lax.bitcast_convert_type(taken, rows.dtype) if is_float else taken


def combine(
    spec: CombineSpec,
    index: RowIndex,
    rows: jax.Array,
    weights: jax.Array | None,
    biases: Sequence[jax.Array],
) -> jax.Array:
    """[num_tokens, hidden]; the contract of the custom call."""
    num_tokens, num_slots = index.send_row.shape
    num_all = spec.group.num_ranks * num_tokens
    recv_src = index.recv_src
    rows = _exact.kept(check_mesh(rows, spec.group, op=spec.op))
    if spec.layout is Layout.RANK:
        partial = _take(rows, _invert(recv_src, num_all))
    else:
        partial = _sum_in_row_order(recv_src, num_all, num_slots, weights, rows)
    # [destination rank, token, hidden]: what each rank has for the tokens of this one
    parts = jax.lax.all_to_all(
        partial.reshape(spec.group.num_ranks, num_tokens, -1),
        spec.group.axes,
        split_axis=0,
        concat_axis=0,
    )
    terms = [term.astype(jnp.float32) for term in (*parts, *map(_exact.kept, biases))]
    return _exact.rounded(_sum(terms), rows.dtype)


def _sum_in_row_order(
    recv_src: jax.Array,
    num_all: int,
    max_rows: int,
    weights: jax.Array | None,
    rows: jax.Array,
) -> jax.Array:
    """[num_all, hidden]: per token the sum of its rows here, in row order, rounded."""
    # Sorted by token, rows stay in order: the how-manieth of its token a row is tells its place in
    # a table [max_rows, num_all], whose other places stay -1.
    places = jnp.arange(recv_src.shape[0], dtype=jnp.int32)
    key = jnp.where(recv_src < 0, num_all, recv_src)
    token, row = jax.lax.sort((key, places), num_keys=1, is_stable=True)
    is_first = token != jnp.concatenate([jnp.full((1,), -1, jnp.int32), token[:-1]])
    turn = places - jax.lax.cummax(jnp.where(is_first, places, 0))
    has_place = (token < num_all) & (turn < max_rows)  # all rows of a handle that is whole
    target = jnp.where(has_place, turn * num_all + token, max_rows * num_all)
    table = jnp.full((max_rows * num_all,), -1, jnp.int32).at[target].set(row, mode="drop")
    table = table.reshape(max_rows, num_all)
    terms = [_take(rows, of_tokens).astype(jnp.float32) for of_tokens in table]
    if weights is not None:
        factors = _take(weights, table)[:, :, None]
        terms = [_exact.kept(term * factor) for term, factor in zip(terms, factors, strict=True)]
    return _exact.rounded(_sum(terms), rows.dtype)


def _sum(terms: Sequence[jax.Array]) -> jax.Array:
    """One by one, beginning with +0, which XLA would leave out if it were written as a term."""
    return _exact.positive_zeros(functools.reduce(jnp.add, terms))


def _gather_tokens(group: GroupSpec, x: jax.Array) -> jax.Array:
    """[num_ranks * T, ...] from every rank's [T, ...]."""
    gathered: jax.Array = jax.lax.all_gather(x, group.axes, tiled=True)
    return gathered


def _rank_of(ids: jax.Array, num_local_experts: int) -> jax.Array:
    return jnp.where(ids >= 0, ids // num_local_experts, -1)


def _own(group: GroupSpec, x: jax.Array) -> jax.Array:
    """This rank's part of what _gather_tokens gave."""
    num_tokens = x.shape[0] // group.num_ranks
    first = jax.lax.axis_index(group.axes) * num_tokens
    own: jax.Array = jax.lax.dynamic_slice_in_dim(x, first, num_tokens)
    return own


def _take(x: jax.Array, index: jax.Array, *, fill: int = 0) -> jax.Array:
    """x[index], `fill` where the index is -1."""
    taken: jax.Array
    valid = (index >= 0).reshape(index.shape + (1,) * (x.ndim - 1))
    taken = jnp.where(valid, x[jnp.maximum(index, 0)], jnp.asarray(fill, x.dtype))
    return taken


def _invert(row: jax.Array, size: int) -> jax.Array:
    """[size] int32: inverse[row[i]] = i, -1 where no i points. Rows of -1 point nowhere."""
    target = jnp.where(row < 0, size, row)
    numbers = jnp.arange(row.shape[0], dtype=jnp.int32)
    return jnp.full((size,), -1, jnp.int32).at[target].set(numbers, mode="drop")


def _count(ids: jax.Array, size: int) -> jax.Array:
    target = jnp.where(ids < 0, size, ids).reshape(-1)
    return jnp.zeros((size,), jnp.int32).at[target].add(1, mode="drop")
