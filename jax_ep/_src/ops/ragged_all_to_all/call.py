"""The custom call of ragged_all_to_all; the _ffi.h of the same stem declares its handler."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jax_ep._src.base import limits
from jax_ep._src.base.options import Pieces
from jax_ep._src.base.spec import CallSpec
from jax_ep._src.ops.common.check_mesh import check_mesh
from jax_ep._src.ops.common.primitive import Result, absent, make_primitive
from jax_ep._src.ops.ragged_all_to_all import stock
from jax_ep._src.ops.ragged_all_to_all.table import Moved, Table


def _results(
    position: Any,
    input_offsets: Any,
    sizes: Any,
    output_offsets: Any,
    recv_sizes: Any,
    *rows: Any,
    has_output: bool,
    num_places: int,
    num_ranks: int,
    pieces: Pieces,
    **_: Any,
) -> Moved:
    num_pieces = 0 if pieces is Pieces.BACK else sizes.shape[0]
    is_packed = pieces is Pieces.PACKED
    sent = rows[: len(rows) - has_output]
    return Moved(
        places=Result((num_pieces,), jnp.int32),
        counts=Result((num_pieces,), jnp.int32),
        send_places=Result((num_ranks if is_packed else 0,), jnp.int32),
        recv_sizes=Result((num_ranks if is_packed else 0,), jnp.int32),
        rows=tuple(Result((num_places, *r.shape[1:]), r.dtype) for r in sent),
    )


def _aliases(*avals: Any, has_output: bool, **_: Any) -> dict[int, int]:
    return {len(avals) - 1: len(Moved._fields) - 1} if has_output else {}


_bind = make_primitive(
    "ragged_all_to_all",
    _results,
    platforms=("cpu", "cuda"),
    attributes=("group", "has_output", "num_sms", "pieces"),
    aliases=_aliases,
)


def exchange(
    spec: CallSpec,
    pieces: Pieces,
    table: Table,
    rows: Sequence[jax.Array],
    *,
    num_places: int,
    output: jax.Array | None = None,
) -> Moved:
    """Moves pieces of each array of rows [N, ...] to their places in arrays [num_places, ...].

    XLA's collectives move them if the custom call has no room to stage the operands, or for its
    table of pieces.

    Args:
      spec: the ranks, and the SMs that they use.
      pieces: what `table` holds.
      table: int32 arrays [K], K a multiple of the ranks.
      rows: this rank's part of each array.
      num_places: rows of each result.
      output: what rows without a piece keep; None: zeros. Only with one array of rows.
    """
    operands = tuple(absent(jnp.int32) if a is None else a for a in table)
    num_pieces = table.sizes.shape[0]
    is_carried = spec.group.can_stage(*rows, *(a for a in table if a is not None)) and (
        spec.backend != "cuda" or num_pieces <= limits.MAX_PIECES
    )
    if spec.backend == "xla" or not is_carried:
        return stock.exchange(spec, pieces, table, rows, num_places=num_places, output=output)
    position = check_mesh(spec.group.position(), spec.group, op=spec.op)
    moved: Moved = _bind(
        position,
        *operands,
        *rows,
        *(() if output is None else (output,)),
        group=spec.group.identity,
        has_output=output is not None,
        num_places=num_places,
        num_ranks=spec.group.num_ranks,
        num_sms=spec.num_sms,
        op=spec.op,
        pieces=pieces,
    )
    return moved
