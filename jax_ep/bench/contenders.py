"""Contenders of a benchmark: our operations on each back end, and the same exchange in stock JAX.

Every function here sees one rank, inside shard_map.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import jax_ep
from jax_ep._src.base import limits
from jax_ep._src.base.config import FP8_BLOCK
from jax_ep._src.base.options import Layout
from jax_ep.bench.shapes import FP8, Point
from jax_ep.testing.cases import dispatch


class Contender(NamedTuple):
    """One way to do it.

    Attributes:
      name: "jax_ep" or the stock collective.
      backend: "cpu", "cuda" or "xla".
      algorithm: what a stock contender is made of; "low_latency": ours for few tokens.
      fill: which rows without a token are zero; None: there is no such promise.
      recv_capacity: rows of the buffer that the experts get.
      sms: the SM budget that the calls are told; None: the group's, where the back end takes one.
      dispatch: (x, topk_idx, topk_weights) to a pytree that holds the rows and the way back.
      combine: that pytree to [tokens, hidden].
      again: (x, handle) to what dispatch gives, along known routing; None: there is no such thing.
    """

    name: str
    backend: str
    algorithm: str | None
    fill: str | None
    recv_capacity: int
    sms: int | None
    dispatch: Callable[..., Any]
    combine: Callable[[Any], jax.Array]
    again: Callable[[Any, Any], Any] | None = None


def contenders(
    point: Point, group: jax_ep.Group, entries: Sequence[tuple[str, int | None]]
) -> list[Contender]:
    """All contenders of a point, ours first: one for each back end and SM budget."""
    stock = [all_gather] if point.layout == "rank" else [all_to_all]
    if point.layout == "expert" and has_ragged_all_to_all(group.mesh):
        stock.append(ragged_all_to_all)
    few = [few_tokens(point, group)] if takes_few(point, group, entries) else []
    return [
        *(ours(point, group, *entry) for entry in entries),
        *few,
        *(make(point, group.axes) for make in stock),
    ]


def has_ragged_all_to_all(mesh: jax.sharding.Mesh) -> bool:
    """Whether XLA's ragged_all_to_all runs there: on GPUs, by default of one process."""
    kinds = {(device.platform, device.process_index) for device in mesh.devices.flat}
    return len(kinds) == 1 and kinds.pop()[0] == "gpu"


def ours(point: Point, group: jax_ep.Group, backend: str, sms: int | None) -> Contender:
    """jax_ep on one back end, with an SM budget where the back end takes one.

    On GPUs the kernels for many tokens carry it, with the group's budget if `sms` is None.
    """

    def told(exchange: str) -> int | None:
        return sms_of(point, group, exchange) if backend == "cuda" and sms is None else sms

    def combine(out: jax_ep.Dispatched) -> jax.Array:
        weights = out.weights if point.layout == "expert" else None
        return jax_ep.combine(
            out.x, out.handle, weights=weights, num_sms=told("combine"), backend=backend
        )

    send = partial(dispatch, point, group, backend, num_sms=told("dispatch"))
    return Contender(
        "jax_ep",
        backend,
        None,
        point.fill,
        point.capacity,
        sms,
        send,
        combine,
        lambda x, handle: jax_ep.dispatch(
            x, handle=handle, num_sms=told("cached_dispatch"), backend=backend
        ),
    )


def sms_of(point: Point, group: jax_ep.Group, *exchanges: str) -> int:
    """The most SMs in the group's budgets for exchanges in the point's layout."""
    return max(group.budgets.of[e][Layout(point.layout)].sms for e in exchanges)


def takes_few(point: Point, group: jax_ep.Group, entries: Sequence[tuple[str, int | None]]) -> bool:
    """Whether the kernels for few tokens have room for a point; no row may be dropped."""
    needed = low_latency_payload(point)
    return (
        any(backend == "cuda" for backend, _ in entries)
        and point.balance is None
        and point.expert_alignment == 1
        and needed <= group.spec.low_latency_room
    )


def low_latency_payload(point: Point) -> int:
    """Bytes that a rank sends to another in a low-latency dispatch or combine."""
    sent = [[point.row_bytes]]
    if point.dtype == FP8:  # rows and scales; the combine has rows of two bytes
        sent = [[point.hidden, 4 * (point.hidden // FP8_BLOCK)], [2 * point.hidden]]
    return max(limits.low_latency_payload(point.num_tokens, point.num_topk, s) for s in sent)


def few_tokens(point: Point, group: jax_ep.Group) -> Contender:
    """The low-latency operations, on all SMs."""

    def send(x: Any, ids: jax.Array, weights: jax.Array) -> jax_ep.Dispatched:
        return jax_ep.low_latency_dispatch(
            x,
            ids,
            weights,
            group=group,
            num_experts=point.num_experts,
            max_tokens_per_rank=point.num_tokens,
            layout=point.layout,
            backend="cuda",
        )

    def combine(out: jax_ep.Dispatched) -> jax.Array:
        weights = out.weights if point.layout == "expert" else None
        return jax_ep.low_latency_combine(out.x, out.handle, weights=weights, backend="cuda")

    return Contender(
        "jax_ep", "cuda", "low_latency", "padding", point.capacity, None, send, combine
    )


class Exchanged(NamedTuple):
    """Results of the hand-written exchange: S = rows for each destination, R = ranks."""

    rows: Any  # [R * S, hidden], or a pair with scales, grouped by local expert; feeds ragged_dot
    group_sizes: jax.Array  # [local experts]
    place: jax.Array  # [R * S] the row that each received slot became
    slot: jax.Array  # [tokens, topk] the slot that each choice was sent in, -1 = dropped
    weights: jax.Array  # [tokens, topk]


def all_to_all(point: Point, axes: tuple[str, ...]) -> Contender:
    """A capacity-limited MoE exchange as one writes it with lax.all_to_all.

    Choices are sorted by expert into one buffer of fixed size per destination, the buffers are
    exchanged, and the rows are sorted again by local expert. Buffers are filled by gathers, never
    by scatters of rows. The weighted sum, in f32, is where the tokens are.
    """
    slots = _slots(point)

    def dispatch(x: Any, ids: jax.Array, weights: jax.Array) -> Exchanged:
        order, expert, slot = _pack(point, ids, slots)
        is_used = expert < point.experts_per_rank

        def exchange(rows: jax.Array) -> jax.Array:
            chosen = rows[order // point.num_topk]
            send = jnp.where(is_used[:, None], chosen, jnp.zeros((), rows.dtype))
            return _swap(send, point.num_ranks, axes)

        received = jax.tree.map(exchange, x)
        expert = _swap(expert, point.num_ranks, axes)
        by_expert = jnp.argsort(expert, stable=True).astype(jnp.int32)
        sizes = jnp.bincount(expert, length=point.experts_per_rank).astype(jnp.int32)
        rows = jax.tree.map(lambda r: r[by_expert], received)
        return Exchanged(rows, sizes, _inverse(by_expert), slot, weights)

    def combine(out: Exchanged) -> jax.Array:
        return _weighted_sum(_swap(out.rows[out.place], point.num_ranks, axes), out)

    algorithm = "sort, all_to_all, sort"
    capacity = slots * point.num_ranks
    return Contender("all_to_all", "xla", algorithm, "zeros", capacity, None, dispatch, combine)


def _slots(point: Point) -> int:
    """Rows for each destination: the same room as jax_ep has, cut into equal parts."""
    worst = point.num_tokens * min(point.num_topk, point.experts_per_rank)
    if point.balance is None:
        return worst
    return min(
        worst, math.ceil(point.num_tokens * point.num_topk * point.balance / point.num_ranks)
    )


def _pack(point: Point, ids: jax.Array, slots: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(choice [R * S], its local expert, past the last where unused, slot of choice [T, K])."""
    choice = ids.reshape(-1)
    order = jnp.argsort(choice, stable=True).astype(jnp.int32)
    to = choice // point.experts_per_rank
    count = jnp.bincount(to, length=point.num_ranks).astype(jnp.int32)
    first = jnp.cumsum(count) - count
    nth = jnp.arange(slots, dtype=jnp.int32)[None]
    chosen = order[jnp.minimum(first[:, None] + nth, choice.size - 1)]
    local = choice[chosen] % point.experts_per_rank
    expert = jnp.where(nth < count[:, None], local, point.experts_per_rank)
    nth_of = _inverse(order) - first[to]
    slot = jnp.where(nth_of < slots, to * slots + nth_of, -1)
    return chosen.reshape(-1), expert.reshape(-1), slot.reshape(ids.shape)


def _inverse(order: jax.Array) -> jax.Array:
    numbers = jnp.arange(order.size, dtype=jnp.int32)
    return jnp.zeros_like(order).at[order].set(numbers, unique_indices=True)


def _weighted_sum(back: jax.Array, out: Exchanged) -> jax.Array:
    """Adds, in f32, the rows that came back to each token."""
    chosen = back[jnp.maximum(out.slot, 0)].astype(jnp.float32)
    weights = jnp.where(out.slot >= 0, out.weights, 0.0)
    return jnp.sum(chosen * weights[:, :, None], axis=1).astype(back.dtype)


def _swap(x: jax.Array, num_ranks: int, axes: tuple[str, ...]) -> jax.Array:
    parts = x.reshape(num_ranks, -1, *x.shape[1:])
    swapped = jax.lax.all_to_all(parts, axes, split_axis=0, concat_axis=0)
    back: jax.Array = swapped.reshape(x.shape)
    return back


class Ragged(NamedTuple):
    """Results of the ragged exchange."""

    exchanged: Exchanged
    sent: jax.Array  # [R, R] rows from each rank to each


def ragged_all_to_all(point: Point, axes: tuple[str, ...]) -> Contender:
    """The exchange without padding: as many rows as there are, with lax.ragged_all_to_all.

    Counts are gathered first; rows are sorted by expert before they are sent and again where they
    arrive. Rows beyond the room are undefined, so the routing must be balanced.
    """
    num_ranks, num_local = point.num_ranks, point.experts_per_rank

    def exchange(rows: jax.Array, room: int, sent: jax.Array) -> jax.Array:
        """Each rank's rows, in the order of destinations, to [room, ...] in the order of ranks."""
        me = jax.lax.axis_index(axes)
        first_in = jnp.cumsum(sent, axis=1) - sent  # of each destination in what a rank sends
        first_out = jnp.cumsum(sent, axis=0) - sent  # of each rank in what a destination gets
        out: jax.Array = jax.lax.ragged_all_to_all(
            rows,
            jnp.zeros((room, *rows.shape[1:]), rows.dtype),
            first_in[me],
            sent[me],
            first_out[me],
            sent[:, me],
            axis_name=axes,
        )
        return out

    def dispatch(x: Any, ids: jax.Array, weights: jax.Array) -> Ragged:
        choice = ids.reshape(-1)
        order = jnp.argsort(choice, stable=True).astype(jnp.int32)
        own = jnp.bincount(choice, length=point.num_experts).astype(jnp.int32)
        counts = jax.lax.all_gather(own, axes).reshape(num_ranks, num_ranks, num_local)
        sent = jnp.sum(counts, axis=2)
        here = counts[:, jax.lax.axis_index(axes)]
        received = jax.tree.map(
            lambda rows: exchange(rows[order // point.num_topk], point.capacity, sent), x
        )
        unused = point.capacity - jnp.sum(here)
        expert = jnp.repeat(
            jnp.append(jnp.tile(jnp.arange(num_local), num_ranks), num_local),
            jnp.append(here.reshape(-1), unused),
            total_repeat_length=point.capacity,
        )
        by_expert = jnp.argsort(expert, stable=True).astype(jnp.int32)
        rows = jax.tree.map(lambda r: r[by_expert], received)
        slot = _inverse(order).reshape(ids.shape)
        sizes = jnp.sum(here, axis=0)
        return Ragged(Exchanged(rows, sizes, _inverse(by_expert), slot, weights), sent)

    def combine(out: Ragged) -> jax.Array:
        rows = out.exchanged.rows[out.exchanged.place]
        back = exchange(rows, point.num_tokens * point.num_topk, out.sent.T)
        return _weighted_sum(back, out.exchanged)

    return Contender(
        "ragged_all_to_all",
        "xla",
        "sort, ragged_all_to_all, sort",
        "zeros",
        point.capacity,
        None,
        dispatch,
        combine,
    )


class Gathered(NamedTuple):
    """Results of the plain exchange of the rank layout, for all ranks' tokens."""

    rows: Any  # [R * T, hidden], or a pair with scales
    topk_idx: jax.Array  # [R * T, topk] local expert ids, -1 = an expert of another rank
    weights: jax.Array  # [R * T, topk]


def all_gather(point: Point, axes: tuple[str, ...]) -> Contender:
    """Every rank gets every token and picks its own; the sums are scattered back."""

    def dispatch(x: Any, ids: jax.Array, weights: jax.Array) -> Gathered:
        rows, ids, weights = jax.tree.map(
            lambda a: jax.lax.all_gather(a, axes, tiled=True), (x, ids, weights)
        )
        local = ids - jax.lax.axis_index(axes) * point.experts_per_rank
        is_here = (local >= 0) & (local < point.experts_per_rank)
        return Gathered(rows, jnp.where(is_here, local, -1), jnp.where(is_here, weights, 0.0))

    def combine(out: Gathered) -> jax.Array:
        is_here = jnp.any(out.topk_idx >= 0, axis=1, keepdims=True)
        rows = jnp.where(is_here, out.rows, jnp.zeros((), out.rows.dtype))
        summed: jax.Array = jax.lax.psum_scatter(rows, axes, tiled=True)
        return summed

    algorithm = "all_gather, psum_scatter"
    capacity = point.num_tokens * point.num_ranks
    return Contender("all_gather", "xla", algorithm, None, capacity, None, dispatch, combine)
