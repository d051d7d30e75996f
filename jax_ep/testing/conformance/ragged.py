"""Checks of ragged_all_to_all and all_to_all_v: values and gradients, to the bit."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_ep
from jax_ep import reference
from jax_ep.reference import PieceTable
from jax_ep.testing.compare import assert_same_bits
from jax_ep.testing.conformance.check import Check, noted
from jax_ep.testing.ranks import on_group

_DTYPES: dict[str, Any] = {
    "bf16": jnp.bfloat16,
    "f16": np.float16,
    "f32": np.float32,
    "f8": jnp.float8_e4m3fn,
    "c64": np.complex64,
    "u8": np.uint8,
    "bool": np.bool_,
}
_NUM_ROWS, _NUM_PLACES = 60, 75


def swap(a: Any) -> Any:
    """Returns what all ranks have for each rank: the all_to_all of a [R, K]."""
    num_ranks = len(a)
    parts = a.reshape(num_ranks, num_ranks, -1)
    return np.ascontiguousarray(parts.swapaxes(0, 1)).reshape(num_ranks, -1)


def side_by_side(rng: np.random.Generator, num_ranks: int, per_peer: int) -> PieceTable:
    """Pieces that lie side by side at both ends; some are empty."""
    num_pieces = num_ranks * per_peer
    most = max(1, min(_NUM_ROWS, _NUM_PLACES) // num_pieces)
    sizes = rng.integers(0, most + 1, (num_ranks, num_pieces)).astype(np.int32)
    if num_pieces > _NUM_ROWS:
        stride = 2 * -(-num_pieces // _NUM_ROWS)
        sizes[np.add.outer(np.arange(num_ranks), np.arange(num_pieces)) % stride > 0] = 0
    recv_sizes = swap(sizes)
    places = (np.cumsum(recv_sizes, axis=1) - recv_sizes).astype(np.int32)
    first = (np.cumsum(sizes, axis=1) - sizes).astype(np.int32)
    return first, sizes, swap(places), recv_sizes


def with_gaps(rng: np.random.Generator, num_ranks: int, per_peer: int) -> PieceTable:
    """Pieces in another order at each end, with rows between them that nobody sends or writes."""
    first, sizes, _, recv_sizes = side_by_side(rng, num_ranks, per_peer)

    def scatter(lengths: Any, room: int) -> Any:
        order = rng.permutation(len(lengths))
        ends = np.cumsum(lengths[order])
        first = np.zeros_like(lengths)
        first[order] = (
            ends - lengths[order] + np.sort(rng.integers(0, room - ends[-1] + 1, len(lengths)))
        )
        return first

    first = np.stack([scatter(s, _NUM_ROWS) for s in sizes])
    places = np.stack([scatter(s, _NUM_PLACES) for s in recv_sizes])
    return first, sizes, swap(places), recv_sizes


def mostly_empty(rng: np.random.Generator, num_ranks: int, per_peer: int) -> PieceTable:
    """Only rank 0 sends, one piece, as many rows as it has, to the last rank."""
    first, sizes, places, recv_sizes = np.zeros((4, num_ranks, num_ranks * per_peer), np.int32)
    sizes[0, -1] = recv_sizes[-1, per_peer - 1] = _NUM_ROWS
    return first, sizes, places, recv_sizes


def the_same_rows(rng: np.random.Generator, num_ranks: int, per_peer: int) -> PieceTable:
    """Pieces that have rows in common at their source, and at some of their places."""
    _, sizes, places, recv_sizes = with_gaps(rng, num_ranks, per_peer)
    first = rng.integers(0, _NUM_ROWS // 4, sizes.shape).astype(np.int32)
    return first, sizes, places // 2, recv_sizes


def out_of_range(rng: np.random.Generator, num_ranks: int, per_peer: int) -> PieceTable:
    """Offsets outside the arrays, negative numbers, and sizes that differ at both ends."""
    shape = (num_ranks, num_ranks * per_peer)
    extremes = np.array([-(2**31), -1, 0, 1, _NUM_ROWS - 1, _NUM_PLACES, 2**31 - 1], np.int32)

    def numbers(most: int) -> Any:
        inside = rng.integers(-2, most, shape).astype(np.int32)
        return np.where(rng.random(shape) < 0.3, rng.choice(extremes, shape), inside)

    return numbers(_NUM_ROWS), numbers(9), numbers(_NUM_PLACES), numbers(9)


TABLES: tuple[Callable[..., PieceTable], ...] = (
    side_by_side,
    with_gaps,
    mostly_empty,
    the_same_rows,
    out_of_range,
)


def ragged_pieces(
    group: jax_ep.Group, backend: str, *, dtype: str, width: int, per_peer: int
) -> None:
    """Compares results and gradients for every kind of table, in one compiled program."""
    kind = np.dtype(_DTYPES[dtype])
    exchange = partial(jax_ep.ragged_all_to_all, axis_name=group, backend=backend)
    has_gradient = jnp.issubdtype(kind, jnp.inexact)

    def run(operand: Any, output: Any, ct: Any, *table: Any) -> Any:
        if not has_gradient:
            return exchange(operand, output, *table), ()
        y, back = jax.vjp(lambda x, out: exchange(x, out, *table), operand, output)
        return y, back(ct)

    compiled = on_group(run, group)
    rng = np.random.default_rng(width)
    for make in TABLES:
        operand, output, ct = (
            rng.integers(0, 2 if dtype == "bool" else 7, (group.num_ranks, rows, width)).astype(
                np.float32 if has_gradient else np.uint8
            )
            for rows in (_NUM_ROWS, _NUM_PLACES, _NUM_PLACES)
        )
        operand, output, ct = (a.astype(kind) for a in (operand, output, ct))
        table = make(rng, group.num_ranks, per_peer)
        result, bars = compiled(operand, output, ct, *table)
        with noted(make.__name__):
            _compare(result, reference.ragged_all_to_all(operand, output, table), "result")
            if has_gradient:
                expected = reference.ragged_all_to_all_gradient(ct, _NUM_ROWS, table)
                _compare(bars[0], expected[0], "gradient of operand")
                _compare(bars[1], expected[1], "gradient of output")


def _compare(got: Any, expected: Any, what: str) -> None:
    if expected.dtype.kind == "c":
        got, expected = jnp.real(got), np.real(expected)
    assert_same_bits(got, expected, what=what)


def packed_rows(group: jax_ep.Group, backend: str, *, capacity: int) -> None:
    """Compares three arrays that travel together, with their counts, and a gradient."""
    num_ranks = group.num_ranks

    def run(x: Any, ids: Any, weights: Any, send_sizes: Any, ct: Any) -> Any:
        def send(x: Any) -> Any:
            out = jax_ep.all_to_all_v(
                {"x": x, "rest": (ids, weights)},
                send_sizes,
                group=group,
                recv_capacity=capacity,
                backend=backend,
            )
            return out.x["x"], out

        _, back, out = jax.vjp(send, x, has_aux=True)
        return out, back(ct)[0]

    compiled = on_group(run, group)
    rng = np.random.default_rng(4)
    x = rng.standard_normal((num_ranks, _NUM_ROWS, 24)).astype(np.float32)
    ids = rng.integers(0, 99, (num_ranks, _NUM_ROWS)).astype(np.int32)
    weights = rng.random((num_ranks, _NUM_ROWS, 3)).astype(jnp.bfloat16)
    ct = rng.standard_normal((num_ranks, capacity, 24)).astype(np.float32)
    most = _NUM_ROWS // num_ranks
    for numbers in (
        rng.integers(0, most + 1, (num_ranks, num_ranks)),
        np.full((num_ranks, num_ranks), most),
        np.eye(num_ranks) * _NUM_ROWS,
    ):
        sizes = numbers.astype(np.int32)
        out, bar = compiled(x, ids, weights, sizes, ct)
        rows, recv_sizes, num_dropped = reference.all_to_all_v(x, sizes, capacity)
        assert_same_bits(out.x["x"], rows, what="x")
        for got, sent in zip(out.x["rest"], (ids, weights), strict=True):
            assert_same_bits(got, reference.all_to_all_v(sent, sizes, capacity)[0], what="rest")
        assert_same_bits(out.recv_sizes, recv_sizes, what="recv_sizes")
        assert_same_bits(out.num_dropped, num_dropped[:, None], what="num_dropped")
        expected = reference.ragged_all_to_all_gradient(ct, _NUM_ROWS, packed_table(sizes))
        assert_same_bits(bar, expected[0], what="gradient")


def packed_table(sizes: Any) -> PieceTable:
    """Returns the table of ragged_all_to_all for send_sizes [R, R] of all_to_all_v."""
    first = (np.cumsum(sizes, axis=1) - sizes).astype(np.int32)
    places = (np.cumsum(sizes, axis=0) - sizes).astype(np.int32)
    return first, sizes, places, np.ascontiguousarray(sizes.T)


_STAGED = 16 * 1024


def _check(dtype: str, width: int, per_peer: int) -> Check:
    params = {"dtype": dtype, "width": width, "per_peer": per_peer}
    return Check(ragged_pieces, frozenset({"ragged_all_to_all"}), params, num_staged=_STAGED)


def _packed(capacity: int) -> Check:
    return Check(
        packed_rows, frozenset({"all_to_all_v"}), {"capacity": capacity}, num_staged=_STAGED
    )


CHECKS = (_check("bf16", 8, 1), _check("f32", 3, 2), _check("bool", 7, 1), _packed(37))
FULL = (
    *CHECKS,
    _check("c64", 2, 1),
    _check("f8", 5, 3),
    _packed(300),
    *(
        _check(dtype, width, per_peer)
        for dtype in ("f16", "bf16", "f32", "u8")
        for width in (1, 6, 64)
        for per_peer in (1, 4)
    ),
)
