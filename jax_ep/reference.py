"""The executable specification: computes all ranks at once in NumPy or jnp, on one device.

Arrays carry a leading rank axis [R, ...]. The module shares no code with the back ends. It defines
their numerics: f32 products and sums in the stated order, each rounded by itself. With NumPy arrays
the results are exact to the bit, subnormals included. With jnp arrays they can be differentiated;
call the functions outside jit, so that XLA fuses or contracts nothing.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int32]
Rows = Any  # np.ndarray or jax.Array


@dataclass(frozen=True)
class Plan:
    """The routing of all ranks. `R` ranks, `T` tokens each, `K` choices, `C` rows, `L` experts."""

    layout: str
    num_tokens: int
    recv_src: Ints  # [R, C] source rank * T + token, -1 = none
    recv_k: Ints  # [R, C] index of the row's choice in its token, -1 = none; rank layout: all -1
    recv_topk_idx: Ints  # [R, C, K] local expert ids, -1 = none; expert layout: all -1
    send_row: Ints  # [R, T, R or K] row at the destination, -1 = none
    send_rank: Ints  # [R, T, R or K] destination, -1 = none
    group_sizes: Ints  # [R, L]
    num_recv: Ints  # [R]
    num_dropped: Ints  # [R]
    num_invalid: Ints  # [R]


def make_plan(
    topk_idx: npt.ArrayLike,
    *,
    num_experts: int,
    layout: str,
    recv_capacity: int,
    expert_alignment: int = 1,
    expert_stride: int = 0,
    rank_mask: npt.ArrayLike | None = None,
) -> Plan:
    """Routes topk_idx [R, T, K], token by token.

    `expert_stride`: rows from the first of a local expert to the first of the next; 0: the groups
    of experts lie side by side. `rank_mask`: [R] bool, False: choices that lead to or from the rank
    are none. None: all ranks take part.
    """
    ids = np.asarray(topk_idx, np.int64)
    num_ranks, num_tokens, num_topk = ids.shape
    num_local = num_experts // num_ranks
    num_slots = num_ranks if layout == "rank" else num_topk
    plan = Plan(
        layout=layout,
        num_tokens=num_tokens,
        recv_src=np.full((num_ranks, recv_capacity), -1, np.int32),
        recv_k=np.full((num_ranks, recv_capacity), -1, np.int32),
        recv_topk_idx=np.full((num_ranks, recv_capacity, num_topk), -1, np.int32),
        send_row=np.full((num_ranks, num_tokens, num_slots), -1, np.int32),
        send_rank=np.full((num_ranks, num_tokens, num_slots), -1, np.int32),
        group_sizes=np.zeros((num_ranks, num_local), np.int32),
        num_recv=np.zeros(num_ranks, np.int32),
        num_dropped=np.zeros(num_ranks, np.int32),
        num_invalid=np.sum((ids < -1) | (ids >= num_experts), axis=(1, 2)).astype(np.int32),
    )
    if rank_mask is not None:
        ids = _leave_out(ids, np.asarray(rank_mask), num_local)
    for dst in range(num_ranks):
        wanted = [
            (src, token, [(k, int(e) - dst * num_local) for k, e in enumerate(ids[src, token])
                          if dst * num_local <= e < (dst + 1) * num_local])
            for src in range(num_ranks)
            for token in range(num_tokens)
        ]  # fmt: skip
        wanted = [w for w in wanted if w[2]]
        if layout == "rank":
            _place_by_rank(plan, dst, wanted, recv_capacity)
        else:
            _place_by_expert(plan, dst, wanted, (recv_capacity, expert_alignment, expert_stride))
    return plan


def _leave_out(ids: Any, rank_mask: Any, num_local: int) -> Any:
    left = ids.copy()
    for rank in np.flatnonzero(~rank_mask):
        left[rank] = -1
        left[(ids >= rank * num_local) & (ids < (rank + 1) * num_local)] = -1
    return left


_Wanted = list[tuple[int, int, list[tuple[int, int]]]]  # source, token, its (k, local expert) here


def _place_by_rank(plan: Plan, dst: int, wanted: _Wanted, recv_capacity: int) -> None:
    for row, (src, token, choices) in enumerate(wanted[:recv_capacity]):
        plan.recv_src[dst, row] = src * plan.num_tokens + token
        plan.send_row[src, token, dst] = row
        plan.send_rank[src, token, dst] = dst
        for k, expert in choices:
            plan.recv_topk_idx[dst, row, k] = expert
            plan.group_sizes[dst, expert] += 1
    plan.num_recv[dst] = min(len(wanted), recv_capacity)
    plan.num_dropped[dst] = len(wanted) - plan.num_recv[dst]


def _place_by_expert(plan: Plan, dst: int, wanted: _Wanted, room: tuple[int, int, int]) -> None:
    recv_capacity, alignment, stride = room
    num_local = plan.group_sizes.shape[1]
    rows_of: list[list[tuple[int, int, int]]] = [[] for _ in range(num_local)]
    for i, (src, token, choices) in enumerate(wanted):
        sizes = [len(rows) + sum(e == expert for _, e in choices)
                 for expert, rows in enumerate(rows_of)]  # fmt: skip
        too_many = sum(_align(size, alignment) for size in sizes) > recv_capacity
        if too_many or (stride and max(sizes) > stride):
            plan.num_dropped[dst] = sum(len(late) for _, _, late in wanted[i:])
            break
        for k, expert in choices:
            rows_of[expert].append((src, token, k))
    first = 0
    for expert, rows in enumerate(rows_of):
        for row, (src, token, k) in enumerate(rows, start=first):
            plan.recv_src[dst, row] = src * plan.num_tokens + token
            plan.recv_k[dst, row] = k
            plan.send_row[src, token, k] = row
            plan.send_rank[src, token, k] = dst
        plan.group_sizes[dst, expert] = _align(len(rows), alignment)
        first += stride or plan.group_sizes[dst, expert]
    plan.num_recv[dst] = plan.group_sizes[dst].sum()


def _align(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


def dispatch(plan: Plan, x: Rows) -> Rows:
    """Returns [R, C, ...] from x [R, T, ...]; rows without a token are zero."""
    flat = x.reshape(-1, *x.shape[2:])
    return _where(plan.recv_src >= 0, flat[np.maximum(plan.recv_src, 0)])


def dispatch_weights(plan: Plan, topk_weights: Rows) -> Rows:
    """Returns [R, C, K] (rank layout) or [R, C] (expert layout) from topk_weights [R, T, K]."""
    rows = dispatch(plan, topk_weights)
    if plan.layout == "rank":
        return _where(plan.recv_topk_idx >= 0, rows)
    rank, row = np.ogrid[: rows.shape[0], : rows.shape[1]]
    return _where(plan.recv_k >= 0, rows[rank, row, np.maximum(plan.recv_k, 0)])


def combine(
    plan: Plan,
    rows: Rows,
    weights: Rows | None = None,
    biases: tuple[Rows, ...] = (),
    *,
    wire: str | None = None,
    ranks_per_node: int | None = None,
) -> Rows:
    """Returns [R, T, H] from rows [R, C, H], weights [R, C] and biases [R, T, H].

    `wire`: "fp8": what a rank adds up for another rank is rounded to fp8. `ranks_per_node`: if
    there are several nodes, each adds up its ranks and rounds the sum to the rows' dtype; the sums
    of the nodes are added in their order. None: all ranks are one node.
    """
    xp = jnp if isinstance(rows, jax.Array) else np
    num_ranks = rows.shape[0]
    zeros = xp.zeros((num_ranks, plan.num_tokens, rows.shape[2]), xp.float32)
    per_node = num_ranks if ranks_per_node is None else ranks_per_node
    sums = []
    for first in range(0, num_ranks, per_node):
        total = zeros
        for dst in range(first, first + per_node):
            if plan.layout == "rank":
                row = plan.send_row[:, :, dst]
                part = _where(row >= 0, rows[dst][np.maximum(row, 0)].astype(np.float32))
            else:
                part = _sum_of_rank(plan, dst, rows[dst], None if weights is None else weights[dst])
            if wire == "fp8":
                is_own = np.arange(num_ranks)[:, None, None] == dst
                part = xp.where(is_own, part, _through_fp8(part))
            total = total + part
        sums.append(total)
    total = sums[0]
    if len(sums) > 1:
        total = zeros
        for node in sums:
            total = total + node.astype(rows.dtype).astype(np.float32)
    for bias in biases:
        total = total + bias.astype(np.float32)
    return total.astype(rows.dtype)


def _through_fp8(part: Rows) -> Rows:
    """Rounds f32 [R, T, H] to fp8 with a scale for each 128 elements, and widens it again."""
    largest = np.float32(448)
    blocks = np.asarray(part).reshape(*part.shape[:2], -1, 128)
    most = np.max(np.abs(blocks), axis=-1, keepdims=True)
    scale = np.maximum(most * (np.float32(1) / largest), np.finfo(np.float32).tiny)
    scaled = np.clip(blocks * (np.float32(1) / scale), -largest, largest)
    rounded = scaled.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    return (rounded * scale).reshape(part.shape)


def combine_weights(plan: Plan, w: Rows, *, ranks_per_node: int | None = None) -> Rows:
    """Returns [R, T, K] from w: [R, C, K] (rank layout, summed) or [R, C] (expert layout)."""
    if plan.layout == "rank":
        return combine(plan, w, ranks_per_node=ranks_per_node)
    return weights_to_tokens(plan, w)


def weights_to_tokens(plan: Plan, at_rows: Rows) -> Rows:
    """Returns [R, T, K] from the result of dispatch_weights, whose transpose it is.

    Numbers are moved, not computed with, so the result is the gradient of a dispatch's topk_weights
    to the bit. Two other gradients are exact to the bit: of the dispatch's x, `combine` of the
    cotangent; of combine_weights, the cotangent moved to the rows.
    """
    num_ranks, num_topk = at_rows.shape[0], plan.recv_topk_idx.shape[2]
    moved = np.zeros((num_ranks, plan.num_tokens, num_topk), at_rows.dtype)
    for dst in range(num_ranks):
        if plan.layout == "rank":
            row = plan.send_row[:, :, dst]
            here = (row >= 0)[..., None] & (plan.recv_topk_idx[dst][row] >= 0)
        else:
            row = plan.send_row
            here = (row >= 0) & (plan.send_rank == dst)
        moved = np.where(here, at_rows[dst][row], moved)
    return moved


def combine_gradient(plan: Plan, cotangent: Rows, weights: Rows | None = None) -> Rows:
    """Returns the gradient [R, C, H] of combine's rows from the cotangent [R, T, H].

    The cotangent is moved to the rows and multiplied by weights [R, C] in f32. The result is exact
    to the bit. So is the gradient of a bias, which is the cotangent. The gradient of weights is
    not: the order of its dot product is not defined.
    """
    moved = dispatch(plan, cotangent)
    if weights is None:
        return moved
    product = moved.astype(np.float32) * weights[..., None]
    return _where(plan.recv_src >= 0, product.astype(cotangent.dtype))


def _sum_of_rank(plan: Plan, dst: int, rows: Rows, weights: Rows | None) -> Rows:
    """Returns [R, T, H] f32: each token's rows on `dst`, added in row order, and rounded."""
    xp = jnp if isinstance(rows, jax.Array) else np
    row = np.where(plan.send_rank == dst, plan.send_row, np.iinfo(np.int32).max)
    row = np.sort(row, axis=-1)  # absent choices last
    total = xp.zeros((*row.shape[:2], rows.shape[1]), xp.float32)
    for j in range(row.shape[2]):
        is_present = row[:, :, j] < rows.shape[0]
        index = np.where(is_present, row[:, :, j], 0)
        term = rows[index].astype(np.float32)
        if weights is not None:
            term = weights[index][..., None] * term
        total = total + _where(is_present, term)
    return total.astype(rows.dtype).astype(np.float32)


def get_dispatch_layout(
    topk_idx: npt.ArrayLike, *, num_experts: int, ranks_per_node: int
) -> tuple[Ints, Ints, Ints, npt.NDArray[np.bool_]]:
    """Counts tokens per rank [R, R], node [R, N], expert [R, E]; makes the mask [R, T, R]."""
    ids = np.asarray(topk_idx, np.int64)
    num_ranks, num_tokens, _ = ids.shape
    per_node = np.zeros((num_ranks, num_ranks // ranks_per_node), np.int32)
    per_expert = np.zeros((num_ranks, num_experts), np.int32)
    in_rank = np.zeros((num_ranks, num_tokens, num_ranks), np.bool_)
    for src in range(num_ranks):
        for token in range(num_tokens):
            experts = [int(e) for e in ids[src, token] if 0 <= e < num_experts]
            ranks = {e // (num_experts // num_ranks) for e in experts}
            for e in experts:
                per_expert[src, e] += 1
            for rank in ranks:
                in_rank[src, token, rank] = True
            for node in {rank // ranks_per_node for rank in ranks}:
                per_node[src, node] += 1
    return in_rank.sum(axis=1).astype(np.int32), per_node, per_expert, in_rank


def _where(mask: npt.NDArray[np.bool_], x: Rows) -> Rows:
    xp = jnp if isinstance(x, jax.Array) else np
    return xp.where(mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim)), x, xp.zeros_like(x))


def all_reduce(x: Rows) -> Rows:
    """Returns the sum of x [R, ...] over the ranks, in their order, on every rank."""
    return np.broadcast_to(_sum_over_ranks(np.asarray(x)), np.shape(x))


def reduce_scatter(x: Rows) -> Rows:
    """Returns on rank r the sum over the ranks of part r of x [R, R, ...]."""
    return _sum_over_ranks(np.asarray(x))


def all_gather(x: Rows) -> Rows:
    """Returns x [R, ...] on every rank: [R, R, ...]."""
    return np.broadcast_to(np.asarray(x), (len(x), *np.shape(x)))


def all_reduce_residual_rmsnorm(
    x: Rows, residual: Rows, scale: Rows, *, eps: float
) -> tuple[Rows, Rows]:
    """Returns (normed, new_residual) of x [R, ..., H], residual [R, ..., H] and scale [R, H].

    The order of the mean is not defined, so normed is right to a few roundings. new_residual is
    exact.
    """
    dtype = np.asarray(x).dtype
    total = all_reduce(x).astype(np.float32)
    new_residual = (total + np.asarray(residual).astype(np.float32)).astype(dtype)
    wide = new_residual.astype(np.float64)
    factor = 1.0 / np.sqrt(np.mean(wide * wide, axis=-1, keepdims=True) + eps)
    scale = np.asarray(scale, np.float64)
    scale = scale.reshape(len(scale), *(1 for _ in wide.shape[1:-1]), -1)
    return (wide * factor * scale).astype(dtype), new_residual


def _sum_over_ranks(x: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Adds up the leading axis in f32, or integers in their own type, wrapping around."""
    if x.dtype.kind in "iu":
        total: npt.NDArray[Any] = np.sum(x, axis=0, dtype=x.dtype)
        return total
    wide = x.astype(np.float32)
    total = wide[0]
    for term in wide[1:]:
        total = total + term
    return total.astype(x.dtype)


PieceTable = tuple[Ints, Ints, Ints, Ints]
"""input_offsets, send_sizes, output_offsets and recv_sizes of all ranks, each [R, K]."""


def ragged_all_to_all(operand: Rows, output: Rows, table: PieceTable) -> Rows:
    """Returns output [R, M, ...] with pieces of operand [R, N, ...] written over it, in order."""
    result = np.array(output)
    for src, dst, first, place, size in _pieces(table, operand.shape[1], output.shape[1]):
        result[dst, place : place + size] = operand[src, first : first + size]
    return result


def ragged_all_to_all_gradient(
    cotangent: Rows, num_rows: int, table: PieceTable
) -> tuple[Rows, Rows]:
    """Returns the cotangents of operand [R, num_rows, ...] and output from that of the result.

    A row that was sent several times gets a sum, in the order of its pieces, in f32 or wider.
    """
    num_ranks, num_places, *width = cotangent.shape
    wide = np.result_type(np.float32, cotangent.dtype) if cotangent.dtype.kind in "fc" else "f4"
    total = np.zeros((num_ranks, num_rows, *width), wide)
    is_touched = np.zeros((num_ranks, num_rows), np.bool_)
    of_output = np.array(cotangent)
    for src, dst, first, place, size in _pieces(table, num_rows, num_places):
        for i in range(size):
            term = cotangent[dst, place + i].astype(wide)
            at = (src, first + i)
            total[at] = total[at] + term if is_touched[at] else term
            is_touched[at] = True
        of_output[dst, place : place + size] = 0
    return total.astype(cotangent.dtype), of_output


def _pieces(
    table: PieceTable, num_rows: int, num_places: int
) -> list[tuple[int, int, int, int, int]]:
    """Lists (source, destination, first row, first place, size), ordered by all of these.

    A piece has the rows that both sides name and that lie inside both arrays, or none if one of
    its offsets is negative.
    """
    input_offsets, send_sizes, output_offsets, recv_sizes = table
    num_ranks, num_pieces = input_offsets.shape
    per_peer = num_pieces // num_ranks
    pieces = []
    for src in range(num_ranks):
        for i in range(num_pieces):
            dst, at_receiver = i // per_peer, src * per_peer + i % per_peer
            first, place = int(input_offsets[src, i]), int(output_offsets[src, i])
            size = min(int(send_sizes[src, i]), int(recv_sizes[dst, at_receiver]))
            size = min(size, num_rows - first, num_places - place)
            if first >= 0 and place >= 0 and size > 0:
                pieces.append((src, dst, first, place, size))
    return pieces


def all_to_all_v(x: Rows, send_sizes: Ints, recv_capacity: int) -> tuple[Rows, Ints, Ints]:
    """Returns (rows [R, recv_capacity, ...], recv_sizes [R, R], num_dropped [R]).

    Rank r sends send_sizes[r, d] rows of x [R, T, ...] to each rank d, side by side.
    """
    num_ranks = len(x)
    rows = np.zeros((num_ranks, recv_capacity, *x.shape[2:]), x.dtype)
    num_dropped = np.zeros(num_ranks, np.int32)
    for dst in range(num_ranks):
        parts = []
        for src in range(num_ranks):
            first = send_sizes[src, :dst].sum()
            parts.append(x[src, first : first + send_sizes[src, dst]])
        whole = np.concatenate(parts)
        rows[dst, : len(whole)] = whole[:recv_capacity]
        num_dropped[dst] = max(0, len(whole) - recv_capacity)
    return rows, np.asarray(send_sizes, np.int32).T, num_dropped
