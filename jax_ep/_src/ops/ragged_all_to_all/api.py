"""ragged_all_to_all: moves pieces of any size between all ranks, as jax.lax.ragged_all_to_all."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_ep._src.base import config
from jax_ep._src.base.errors import ConfigError, DTypeError, ShapeError
from jax_ep._src.base.options import BackendName, Layout
from jax_ep._src.base.spec import CallSpec
from jax_ep._src.group.group import Group
from jax_ep._src.ops.common.checks import Checks
from jax_ep._src.ops.common.vary import vary_alike
from jax_ep._src.ops.ragged_all_to_all import vjp
from jax_ep._src.ops.ragged_all_to_all.axis import find_group
from jax_ep._src.ops.ragged_all_to_all.table import Table

_check = Checks("ragged_all_to_all")


def ragged_all_to_all(  # noqa: PLR0917 (the signature of jax.lax.ragged_all_to_all)
    operand: jax.Array,
    output: jax.Array,
    input_offsets: jax.Array,
    send_sizes: jax.Array,
    output_offsets: jax.Array,
    recv_sizes: jax.Array,
    *,
    axis_name: Group | str | Sequence[str],
    axis_index_groups: None = None,
    num_sms: int | None = None,
    backend: BackendName | None = None,
) -> jax.Array:
    """Moves pieces of an array to all ranks: `jax.lax.ragged_all_to_all`, on CPUs too.

    Piece `i` of the K pieces goes to rank `i // (K // num_ranks)`. It has the rows
    `operand[input_offsets[i] : input_offsets[i] + send_sizes[i]]`, which are written to the result
    of that rank, from row `output_offsets[i]` on.

    Args:
      operand: [N, ...] of any dtype of whole bytes and any trailing shape, the same on all ranks.
      output: [M, ...], like operand but for M. The result is written over it where it is not used
        any more.
      input_offsets: [K] of any integer dtype; K a multiple of the ranks. First row of each piece.
      send_sizes: [K], rows of each piece, 0 allowed.
      output_offsets: [K], first row of each piece in the result of the rank that it goes to.
      recv_sizes: [K], rows of each piece that this rank receives, ordered by the rank that it
        comes from: the `send_sizes` of the others.
      axis_name: the group, or the mesh axis or axes along which exactly one open group runs here.
      axis_index_groups: None. A group has the ranks along its axes.
      num_sms: SMs that the call and its gradient use on the `cuda` back end; None: the group's
        budget for a dispatch along a handle. Static.
      backend: None (the group's), "cpu", "cuda" (GPU groups) or "xla".

    Returns:
      [M, ...]: `output` with the pieces that were sent here. Rows that nobody writes keep their
      value.

    Bad metadata never reads or writes outside the arrays. A piece with a negative offset moves
    nothing. Of another piece, those rows move that lie inside both arrays, and no more than the
    smaller of its size at the sender and at the receiver. Of pieces with the same row of a result,
    the last one counts, in the order of sources, and of the pieces of a source.

    Collective: every rank of the group calls it, inside jax.shard_map over the group's mesh.
    Gradient: of operand, the cotangent of the places that its rows went to; a row that was sent
      several times gets the sum, in f32 or wider, in the order of its pieces. (The gradient of
      `jax.lax.ragged_all_to_all` is one of the terms.) Of output, the cotangent of the rows that
      nobody has written. Second derivatives raise ConfigError; JAX refuses forward mode.
    Batches: `jax.vmap` makes one call for each element, in order.
    Limits: N * num_ranks and M below 2^31. On the `cuda` back end, XLA's collectives carry calls
      with more than 4,096 pieces.
    Raises: ShapeError, DTypeError, ConfigError, GroupError while tracing; PeerTimeoutError,
      GroupError from `group.check()`.
    Source: `jax.lax.ragged_all_to_all` (JAX, 2024) for what it does; rows are pulled, as in
      `dispatch`.
    """
    group = _check.group(find_group(axis_name, op=_check.op))
    if axis_index_groups is not None:
        raise ConfigError(
            f"{_check.op}: axis_index_groups is not supported: open a group over the axis of a "
            f"mesh whose rows are those groups, got {axis_index_groups!r}"
        )
    operand, output = _arrays(operand, output, group)
    table = Table(
        *(
            metadata(_check, value, name=name)
            for name, value in (
                ("input_offsets", input_offsets),
                ("send_sizes", send_sizes),
                ("output_offsets", output_offsets),
                ("recv_sizes", recv_sizes),
            )
        )
    )
    for name, array in zip(("send_sizes", "output_offsets", "recv_sizes"), table[1:], strict=True):
        _check.shape(array, table.input_offsets.shape, name=f"{name}, like input_offsets,")
    num_pieces = table.sizes.shape[0]
    if num_pieces % group.num_ranks:
        raise ShapeError(
            f"{_check.op}: the length of the metadata must be a multiple of "
            f"num_ranks={group.num_ranks}, got {num_pieces}"
        )
    spec = call_spec(_check, group, num_sms, backend)
    operand, output, table = vary_alike((operand, output, table), group)
    if operand.size == 0 or output.size == 0:
        return output
    return vjp.ragged_all_to_all(spec, operand.shape[0], operand, output, table)


def call_spec(check: Checks, group: Group, num_sms: int | None, backend: str | None) -> CallSpec:
    """Returns the static facts of a call and its gradient."""
    wanted = check.backend(backend, group)
    if num_sms is not None:
        num_sms = check.integer(num_sms, minimum=1, name="num_sms")
    budget = group.budgets.of["cached_dispatch"][Layout.RANK]
    return CallSpec(group.spec, wanted, num_sms or budget.sms, check.op)


def moved_array(check: Checks, value: Any, *, name: str) -> Any:
    """Returns an array [N, ...] whose rows are whole bytes."""
    x = check.array(value, name=name)
    if x.ndim == 0:
        raise ShapeError(f"{check.op}: {name} must be [N, ...], got shape ()")
    is_extended = jnp.issubdtype(x.dtype, jax.dtypes.extended)
    if is_extended or jax.dtypes.itemsize_bits(x.dtype) % 8:
        raise DTypeError(f"{check.op}: elements of {name} must be whole bytes, got {x.dtype}")
    return jnp.asarray(x)


def countable(check: Checks, num_rows: int, num_places: int, group: Group) -> None:
    """Raises ShapeError unless int32 counts the rows of all ranks, and the places of one."""
    if num_rows > config.MAX_INDEX // group.num_ranks or num_places > config.MAX_INDEX:
        raise ShapeError(
            f"{check.op}: rows of all ranks and of the result must be countable in int32, got "
            f"{num_rows} rows of each of {group.num_ranks} ranks, {num_places} of the result"
        )


def metadata(check: Checks, value: Any, *, name: str) -> jax.Array:
    """Returns [K] int32. Wider numbers that do not fit stay out of range."""
    x = check.array(value, name=name)
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise DTypeError(f"{check.op}: {name} must be of integer type, got {x.dtype.name}")
    if x.ndim != 1 or x.shape[0] < 1:
        raise ShapeError(
            f"{check.op}: {name} must be rank 1 with positive dimension size, got shape {x.shape}"
        )
    kind = np.iinfo(x.dtype)
    lowest, highest = max(-1, int(kind.min)), min(config.MAX_INDEX, int(kind.max))
    clipped = jnp.clip(jnp.asarray(x), jnp.asarray(lowest, x.dtype), jnp.asarray(highest, x.dtype))
    return clipped.astype(jnp.int32)


def _arrays(operand: Any, output: Any, group: Group) -> tuple[jax.Array, jax.Array]:
    operand = moved_array(_check, operand, name="operand")
    output = moved_array(_check, output, name="output")
    _check.dtype(output, (operand.dtype,), name="output, like operand,")
    if operand.shape[1:] != output.shape[1:]:
        raise ShapeError(
            f"{_check.op}: operand and output must have equal shapes but for the first axis, got "
            f"{operand.shape} and {output.shape}"
        )
    countable(_check, operand.shape[0], output.shape[0], group)
    return operand, output
