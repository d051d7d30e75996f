"""ragged_all_to_all and all_to_all_v with their gradients.

The gradient moves the cotangent back along the same pieces. A rank knows its own offsets, and each
peer knows how many rows it has taken, so nothing else is exchanged.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jax_ep._src.base.operations import RAGGED_NAME
from jax_ep._src.base.options import Pieces
from jax_ep._src.base.spec import CallSpec, gradient_of
from jax_ep._src.ops.ragged_all_to_all import call
from jax_ep._src.ops.ragged_all_to_all.table import Moved, Table, is_written

Rows = tuple[jax.Array, ...]
# Dtypes whose sums the custom call knows. Others go back as f32.
_SUM_DTYPES = ("bfloat16", "float16", "float32", "float64", "complex64", "complex128")


class _Way(NamedTuple):
    """What leads the cotangents back: offsets of what was sent, and of what was received."""

    input_offsets: jax.Array
    output_offsets: jax.Array
    places: jax.Array
    counts: jax.Array


def _named(moved: Moved) -> Moved:
    named: Moved = jax.tree.map(lambda a: checkpoint_name(a, RAGGED_NAME), moved)
    return named


def _back(spec: CallSpec, way: _Way, cts: Sequence[Any], num_rows: int) -> tuple[Any, ...]:
    """Returns the cotangents of the rows; None for arrays without one."""
    spec = replace(spec, op=gradient_of(spec.op))
    table = Table(way.input_offsets, way.counts, way.output_offsets, None)
    wanted = [i for i, ct in enumerate(cts) if jnp.issubdtype(ct.dtype, jnp.inexact)]
    sent = [
        cts[i] if cts[i].dtype.name in _SUM_DTYPES else cts[i].astype(jnp.float32) for i in wanted
    ]
    if not sent:
        return tuple(None for _ in cts)
    moved = call.exchange(spec, Pieces.BACK, table, sent, num_places=num_rows)
    bars: list[Any] = [None for _ in cts]
    for i, bar in zip(wanted, moved.rows, strict=True):
        bars[i] = bar.astype(cts[i].dtype)
    return tuple(bars)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def ragged_all_to_all(
    spec: CallSpec, num_rows: int, operand: jax.Array, output: jax.Array, table: Table
) -> jax.Array:
    """Writes pieces of the peers' operands [num_rows, ...] over `output`."""
    return _ragged_fwd(spec, num_rows, operand, output, table)[0]


def _ragged_fwd(
    spec: CallSpec, num_rows: int, operand: jax.Array, output: jax.Array, table: Table
) -> tuple[jax.Array, _Way]:
    num_places = output.shape[0]
    moved = _named(
        call.exchange(spec, Pieces.GIVEN, table, (operand,), num_places=num_places, output=output)
    )
    way = _Way(table.input_offsets, table.output_offsets, moved.places, moved.counts)
    return moved.rows[0], way


def _ragged_bwd(
    spec: CallSpec, num_rows: int, way: _Way, ct: jax.Array
) -> tuple[Any, jax.Array, None]:
    (operand_bar,) = _back(spec, way, (ct,), num_rows)
    written = is_written(way.places, way.counts, ct.shape[0])
    written = written.reshape(-1, *(1 for _ in ct.shape[1:]))
    return operand_bar, jnp.where(written, jnp.zeros((), ct.dtype), ct), None


ragged_all_to_all.defvjp(_ragged_fwd, _ragged_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def all_to_all_v(
    spec: CallSpec, num_rows: int, recv_capacity: int, rows: Rows, send_sizes: jax.Array
) -> Moved:
    """Sends rows that lie side by side, by destination; they arrive side by side, by source."""
    return _packed_fwd(spec, num_rows, recv_capacity, rows, send_sizes)[0]


def _packed_fwd(
    spec: CallSpec, num_rows: int, recv_capacity: int, rows: Rows, send_sizes: jax.Array
) -> tuple[Moved, _Way]:
    table = Table(None, send_sizes, None, None)
    moved = _named(call.exchange(spec, Pieces.PACKED, table, rows, num_places=recv_capacity))
    first = jnp.cumsum(send_sizes, dtype=jnp.int32) - send_sizes
    return moved, _Way(first, moved.send_places, moved.places, moved.counts)


def _packed_bwd(
    spec: CallSpec, num_rows: int, recv_capacity: int, way: _Way, ct: Moved
) -> tuple[Any, None]:
    return _back(spec, way, ct.rows, num_rows), None


all_to_all_v.defvjp(_packed_fwd, _packed_bwd)
