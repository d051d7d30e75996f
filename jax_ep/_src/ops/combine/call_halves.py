"""The custom calls of the halves of a combine; xla_ffi/ops/combine/halves_ffi.h has handlers."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jax_ep._src.base.options import ExchangeMode, Layout
from jax_ep._src.base.spec import RouteSpec, RowIndex
from jax_ep._src.ops.combine import call
from jax_ep._src.ops.common import halves
from jax_ep._src.ops.common.check_mesh import check_mesh
from jax_ep._src.ops.common.few_tokens import half_sms, has_halves
from jax_ep._src.ops.common.primitive import Result, absent, make_primitive

Arrays = Sequence[jax.Array]


class Sums(NamedTuple):
    """Operands that a send adds up, and a receive reads. `weights`: at the rows."""

    places: RowIndex
    rows: jax.Array
    weights: jax.Array | None


class _Sent(NamedTuple):
    """Arrays, or their shape and dtype, in the order of the handler."""

    flight: Any
    through: tuple[Any, ...]


def _sent(*operands: Any, num_through: int, **_: Any) -> _Sent:
    passed = operands[len(operands) - num_through :]
    return _Sent(halves.flight(), tuple(Result(a.shape, a.dtype) for a in passed))


def _aliases(*operands: Any, num_through: int, **_: Any) -> dict[int, int]:
    first = len(operands) - num_through
    return {first + i: 1 + i for i in range(num_through)}


_bind_send = make_primitive(
    "combine_send",
    _sent,
    platforms=("cpu", "cuda"),
    attributes=("group", "has_weights", "layout", "num_sms", "wire"),
    batch=halves.refuse_batch,
    aliases=_aliases,
    is_pure=False,
)


def _sums(*operands: Any, **_: Any) -> Any:
    send_row, rows = operands[3], operands[7]
    return Result((send_row.shape[0], *rows.shape[1:]), rows.dtype)


_bind_recv = make_primitive(
    "combine_recv",
    _sums,
    platforms=("cpu", "cuda"),
    attributes=call.ATTRIBUTES,
    batch=halves.refuse_batch,
    is_pure=False,
)


def _is_carried(spec: RouteSpec) -> bool:
    """Returns whether the halves are custom calls."""
    return has_halves(spec) or (spec.backend == "cpu" and spec.group.staging_bytes is None)


def combine_send(
    spec: RouteSpec, sums: Sums, after: Arrays, through: Arrays
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Sends the sums. Returns the number of the flight, and `through`, behind the send."""
    index, rows, weights = sums
    if not _is_carried(spec):
        number = halves.no_flight((rows, *after))
        return number, halves.behind(tuple(through), number)
    sent: _Sent = _bind_send(
        check_mesh(spec.group.position(), spec.group, op=spec.op),
        index.send_row,
        index.recv_src,
        absent(jnp.int32) if index.recv_k is None else index.recv_k,
        absent(jnp.float32) if weights is None else weights,
        rows,
        *after,
        *through,
        group=spec.group.identity,
        has_weights=weights is not None,
        layout=spec.layout,
        num_sms=half_sms(spec),
        num_through=len(through),
        op=spec.op,
        wire=spec.wire,
    )
    return sent.flight, sent.through


def combine_recv(
    spec: RouteSpec, number: jax.Array, sums: Sums, biases: Arrays, after: Arrays
) -> jax.Array:
    """Receives the sums of this rank's tokens; where nothing was sent, makes the whole exchange."""
    index, rows, weights = sums
    if not _is_carried(spec):
        rows = halves.behind(rows, number, *after)
        return call.combine(spec, index, rows, weights, biases)
    y: jax.Array = _bind_recv(
        check_mesh(spec.group.position(), spec.group, op=spec.op),
        number,
        absent(jnp.int32) if index.send_rank is None else index.send_rank,
        index.send_row,
        index.recv_src,
        index.recv_k if spec.layout is Layout.EXPERT else absent(jnp.int32),
        absent(jnp.float32) if weights is None else weights,
        rows,
        *biases,
        *after,
        group=spec.group.identity,
        has_rank_mask=False,
        has_weights=weights is not None,
        layout=spec.layout,
        mode=ExchangeMode.LOW_LATENCY,
        num_biases=len(biases),
        num_sms=half_sms(spec),
        op=spec.op,
        wire=spec.wire,
    )
    return y
