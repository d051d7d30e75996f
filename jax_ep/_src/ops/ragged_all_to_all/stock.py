"""ragged_all_to_all from XLA's collectives: gathers all ranks' rows, and takes the wanted rows."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jax_ep._src.base import exact
from jax_ep._src.base.options import Pieces
from jax_ep._src.base.spec import CallSpec
from jax_ep._src.ops.common.check_mesh import check_mesh
from jax_ep._src.ops.common.tokens import gather_tokens, take
from jax_ep._src.ops.pull_rows.stock import pull_rows
from jax_ep._src.ops.ragged_all_to_all.table import Moved, Table


class _Arriving(NamedTuple):
    """The pieces that come to this rank, [K] each, by source."""

    first: jax.Array  # row at the source
    place: jax.Array  # row here
    size: jax.Array


def exchange(
    spec: CallSpec,
    pieces: Pieces,
    table: Table,
    rows: Sequence[jax.Array],
    *,
    num_places: int,
    output: jax.Array | None,
) -> Moved:
    """Computes the results of the custom call."""
    num_rows = rows[0].shape[0]
    table = table._replace(sizes=check_mesh(table.sizes, spec.group, op=spec.op))
    none = jnp.zeros((0,), jnp.int32)
    if pieces is Pieces.BACK:
        sizes = _swap(spec, table.sizes)
        back = _clip(table.output_offsets, table.input_offsets, sizes, num_rows, num_places)
        sums = tuple(_sum_rows(spec, back, r, num_places) for r in rows)
        return Moved(none, none, none, none, sums)
    send_places = recv_sizes = none
    if pieces is Pieces.PACKED:
        sizes = jax.lax.all_gather(table.sizes, spec.group.axes)  # [source, destination]
        rank = jax.lax.axis_index(spec.group.axes)
        first = (jnp.cumsum(sizes, axis=1, dtype=jnp.int32) - sizes)[:, rank]
        before = jnp.cumsum(sizes, axis=0, dtype=jnp.int32) - sizes
        send_places, recv_sizes = before[rank], sizes[:, rank]
        arriving = _clip(first, before[:, rank], recv_sizes, num_rows, num_places)
    else:
        first, sizes, place = (_swap(spec, a) for a in table[:3])
        sizes = jnp.minimum(sizes, table.recv_sizes)
        arriving = _clip(first, place, sizes, num_rows, num_places)
    index = _index(spec, arriving, num_rows, num_places)
    moved = tuple(pull_rows(spec, index, r) for r in rows)
    if output is not None:
        moved = (_select(index >= 0, moved[0], output),)
    return Moved(arriving.place, arriving.size, send_places, recv_sizes, moved)


def _swap(spec: CallSpec, a: jax.Array) -> jax.Array:
    """Returns what all ranks have in this rank's part of [K], by rank."""
    swapped: jax.Array = jax.lax.all_to_all(a, spec.group.axes, 0, 0, tiled=True)
    return swapped


def _clip(
    first: jax.Array, place: jax.Array, size: jax.Array, num_rows: int, num_places: int
) -> _Arriving:
    """Leaves out the rows of pieces that lie outside the arrays."""
    is_inside = (first >= 0) & (place >= 0)
    left = jnp.minimum(num_rows - first, num_places - place)
    count = jnp.where(is_inside, jnp.clip(size, 0, jnp.maximum(left, 0)), 0)
    return _Arriving(first, place, count)


def _covers(arriving: _Arriving, num_places: int) -> jax.Array:
    """Returns [num_places, K] bool, whether each piece has a row for each place."""
    row = jnp.arange(num_places, dtype=jnp.int32)[:, None]
    first, count = arriving.place[None, :], arriving.size[None, :]
    return (count > 0) & (row >= first) & (row < first + count)


def _index_of(spec: CallSpec, arriving: _Arriving, piece: jax.Array, num_rows: int) -> jax.Array:
    """Returns [num_places] int32, rank * num_rows + row of the row of `piece`; -1 = no piece."""
    place = jnp.arange(piece.shape[0], dtype=jnp.int32)
    known = jnp.maximum(piece, 0)
    rank = known // (arriving.first.shape[0] // spec.group.num_ranks)
    row = arriving.first[known] + place - arriving.place[known]
    return jnp.where(piece >= 0, rank * num_rows + row, -1)


def _index(spec: CallSpec, arriving: _Arriving, num_rows: int, num_places: int) -> jax.Array:
    number = jnp.arange(arriving.first.shape[0], dtype=jnp.int32)[None, :]
    last = jnp.max(jnp.where(_covers(arriving, num_places), number, -1), axis=1)
    return _index_of(spec, arriving, last, num_rows)


def _sum_rows(spec: CallSpec, arriving: _Arriving, rows: jax.Array, num_places: int) -> jax.Array:
    """Adds up the rows of all pieces for each place, in the order of the pieces."""
    num_rows, num_pieces = rows.shape[0], arriving.first.shape[0]
    gathered = gather_tokens(spec.group, rows)
    wide = gathered.dtype if gathered.dtype.itemsize >= 4 else jnp.dtype(jnp.float32)
    covers = _covers(arriving, num_places)
    number = jnp.arange(num_pieces, dtype=jnp.int32)[None, :]

    def next_piece(piece: jax.Array) -> jax.Array:
        found = jnp.min(jnp.where(covers & (number > piece[:, None]), number, num_pieces), axis=1)
        return jnp.where(found < num_pieces, found, -1)

    def term(piece: jax.Array) -> jax.Array:
        return take(gathered, _index_of(spec, arriving, piece, num_rows)).astype(wide)

    def is_left(state: tuple[jax.Array, jax.Array]) -> jax.Array:
        return jnp.any(state[0] >= 0)

    def add(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        piece, total = state
        has_term = (piece >= 0).reshape(-1, *(1 for _ in rows.shape[1:]))
        total = jnp.where(has_term, total + term(piece), total)
        later = jnp.where(piece >= 0, next_piece(piece), -1)
        return later, total

    first = next_piece(jnp.full_like(covers[:, 0], -1, jnp.int32))
    second = jnp.where(first >= 0, next_piece(first), -1)
    _, total = jax.lax.while_loop(is_left, add, (second, term(first)))
    return exact.rounded(total, rows.dtype)


def _select(mask: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns rows of `a` where the mask is set, else of `b`, to the bit."""
    where = mask.reshape(-1, *(1 for _ in a.shape[1:]))
    if not jnp.issubdtype(a.dtype, jnp.floating):
        return jnp.where(where, a, b)
    carrier = jnp.dtype(f"uint{8 * a.dtype.itemsize}")
    moved, kept = (jax.lax.bitcast_convert_type(x, carrier) for x in (a, b))
    selected: jax.Array = jnp.where(where, moved, kept)
    return jax.lax.bitcast_convert_type(selected, a.dtype)
