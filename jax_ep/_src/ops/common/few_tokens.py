"""The choice between the kernels for many tokens and those for few; the results are the same."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jax_ep._src.base import config, limits, native_modules
from jax_ep._src.base.errors import ConfigError
from jax_ep._src.base.options import ExchangeMode, Layout, Quantize
from jax_ep._src.base.spec import DispatchSpec, ExchangeSpec, RouteSpec, RowIndex

# SMs of a rank that the size of a table is computed for: GPUs have more, ranks may share them.
_FEW_SMS = 16


class Kernels(NamedTuple):
    """The kernels that carry an exchange on GPUs, and the SMs that they use."""

    mode: ExchangeMode
    num_sms: int


def dispatch_kernels(
    spec: DispatchSpec, routing: tuple[int, ...], rows: Sequence[jax.Array]
) -> Kernels:
    """Returns the kernels for a dispatch. `routing`: the shape of topk_idx."""
    if not _may_take_few(spec, routing[0]) or (
        _drops_rows(spec, routing) or _why_no_dispatch(spec, routing, rows) is not None
    ):
        return Kernels(ExchangeMode.THROUGHPUT, spec.num_sms)
    return Kernels(ExchangeMode.LOW_LATENCY, _few_sms(spec))


def combine_kernels(spec: RouteSpec, index: RowIndex, rows: jax.Array) -> Kernels:
    """Returns the kernels for a combine."""
    slots = index.send_row.shape
    is_long = spec.mode is None and spec.recv_capacity > config.MAX_FEW_ROWS
    if (
        is_long
        or not _may_take_few(spec, slots[0])
        or _why_no_combine(spec, slots, rows) is not None
    ):
        return Kernels(ExchangeMode.THROUGHPUT, spec.num_sms)
    return Kernels(ExchangeMode.LOW_LATENCY, _few_sms(spec))


def _few_sms(spec: ExchangeSpec) -> int:
    most = config.PLAIN_FEW_SMS if spec.mode is None else config.ALL_SMS
    return spec.few_sms or most


def _may_take_few(spec: ExchangeSpec, num_tokens: int) -> bool:
    if spec.mode is None:
        return num_tokens <= config.MAX_FEW_TOKENS
    return spec.mode is ExchangeMode.LOW_LATENCY


def require_dispatch(
    spec: DispatchSpec,
    routing: tuple[int, ...],
    rows: Sequence[jax.Array],
    *,
    leaves_out: bool = False,
) -> None:
    """Raises ConfigError if a low-latency dispatch does not fit into what the group has.

    Back ends without such kernels need nothing, nor do calls that may drop rows: the kernels of
    dispatch carry these. `leaves_out`: whether the call has a mask of ranks, which on GPUs only the
    kernels for few tokens know.
    """
    if leaves_out and spec.backend == "cuda":
        if _drops_rows(spec, routing):
            most = spec.worst_capacity(*routing)
            _require(spec, f"with rank_mask recv_capacity must be at least {most}")
        _require(spec, _why_no_dispatch(spec, routing, rows))
    elif _has_kernels(spec) and not _drops_rows(spec, routing):
        _require(spec, _why_no_dispatch(spec, routing, rows))


def require_combine(spec: RouteSpec, index: RowIndex, rows: jax.Array) -> None:
    """Raises ConfigError if a low-latency combine does not fit into what the group has."""
    if _has_kernels(spec) or (index.rank_mask is not None and spec.backend == "cuda"):
        _require(spec, _why_no_combine(spec, index.send_row.shape, rows))


def has_halves(spec: DispatchSpec | RouteSpec) -> bool:
    """Returns whether kernels send and receive apart; elsewhere a receive does everything."""
    return _has_kernels(spec)


def half_sms(spec: DispatchSpec | RouteSpec) -> int:
    """Returns the SMs of a kernel that sends or receives."""
    return _few_sms(spec) if _has_kernels(spec) else spec.num_sms


def require_dispatch_halves(
    spec: DispatchSpec, routing: tuple[int, ...], rows: Sequence[jax.Array]
) -> None:
    """Raises ConfigError if kernels cannot send and receive a dispatch apart."""
    if not has_halves(spec):
        require_dispatch(spec, routing, rows)
        return
    if _drops_rows(spec, routing):
        raise ConfigError(
            f"{spec.op}: recv_capacity must be at least {spec.worst_capacity(*routing)}, the worst "
            f"case, got {spec.recv_capacity}"
        )
    num_tokens, num_topk = routing
    _require(spec, _why_no_room(spec, num_tokens, num_topk, rows, is_halved=True))
    _require(spec, _why_no_table(spec, num_tokens, num_topk))


def require_combine_halves(spec: RouteSpec, index: RowIndex, rows: jax.Array) -> None:
    """Raises ConfigError if kernels cannot send and receive a combine apart."""
    if not has_halves(spec):
        require_combine(spec, index, rows)
    else:
        _require(spec, _why_no_combine(spec, index.send_row.shape, rows, is_halved=True))


def _require(spec: ExchangeSpec, why_not: str | None) -> None:
    if why_not is not None:
        raise ConfigError(f"{spec.op}: {why_not}")


def sent_rows(rows: Sequence[jax.Array], quantize: Quantize) -> list[tuple[tuple[int, ...], Any]]:
    """Returns shape and dtype of a row of each array that a dispatch sends."""
    sent = [(r.shape[1:], r.dtype) for r in rows]
    if quantize is Quantize.NONE:
        return sent
    (hidden,), _ = sent[0]
    scales = jnp.uint8 if quantize is Quantize.FP8_E8M0 else jnp.float32
    rounded = [((hidden,), jnp.float8_e4m3fn), ((hidden // config.FP8_BLOCK,), scales)]
    return rounded + sent[1:]


def _has_kernels(spec: DispatchSpec | RouteSpec) -> bool:
    return spec.backend == "cuda" and spec.group.has_packets


def _drops_rows(spec: DispatchSpec, routing: tuple[int, ...]) -> bool:
    return spec.recv_capacity < spec.worst_capacity(*routing)


def _why_no_dispatch(
    spec: DispatchSpec, routing: tuple[int, ...], rows: Sequence[jax.Array]
) -> str | None:
    if not _has_kernels(spec):
        return "the back end has no kernels for few tokens"
    num_tokens, num_topk = routing
    return _why_no_room(spec, num_tokens, num_topk, rows) or _why_no_table(
        spec, num_tokens, num_topk
    )


def _why_no_combine(
    spec: RouteSpec, slots: tuple[int, ...], rows: jax.Array, *, is_halved: bool = False
) -> str | None:
    """`slots`: the shape of send_row."""
    if not _has_kernels(spec):
        return "the back end has no kernels for few tokens"
    num_tokens, num_slots = slots
    if num_slots > limits.MAX_TOPK:
        return f"a token has at most {limits.MAX_TOPK} choices, got {num_slots}"
    no_room = _why_no_room(spec, num_tokens, 0, (rows,), is_halved=is_halved)
    return no_room or _why_no_held_rows(spec, slots)


def _why_no_held_rows(spec: RouteSpec, slots: tuple[int, ...]) -> str | None:
    """Returns why a block's table of the rows of its tokens is too large, or None."""
    num_tokens, num_slots = slots
    num_sms = min(spec.few_sms or _FEW_SMS, _FEW_SMS)
    held = 1 if spec.layout is Layout.RANK else num_slots
    size = 4 * spec.group.num_ranks * -(-num_tokens // num_sms) * held
    if size <= limits.MAX_LOW_LATENCY_TABLE:
        return None
    return (
        f"the table of rows has {size} bytes on each of {num_sms} SMs, "
        f"at most {limits.MAX_LOW_LATENCY_TABLE}"
    )


def _why_no_room(
    spec: DispatchSpec | RouteSpec,
    num_tokens: int,
    num_topk: int,
    rows: Sequence[jax.Array],
    *,
    is_halved: bool = False,
) -> str | None:
    how = spec.quantize if isinstance(spec, DispatchSpec) else spec.wire
    sent = sent_rows(rows, how)
    row_bytes = [math.prod(width) * jnp.dtype(dtype).itemsize for width, dtype in sent]
    needed = limits.low_latency_payload(num_tokens, num_topk, row_bytes)
    group = spec.group
    room, name = group.low_latency_room, "low_latency_bytes"
    num_parts = 2 * group.num_ranks
    if is_halved:
        room, name = group.in_flight_room, "in_flight_bytes"
        num_parts *= limits.MAX_IN_FLIGHT
    if needed <= room:
        return None
    return (
        f"a rank sends {needed} bytes to another, and the group has room for {room}: open it with "
        f"{name}={num_parts * needed} or more (jax_ep.{name})"
    )


def _why_no_table(spec: DispatchSpec, num_tokens: int, num_topk: int) -> str | None:
    if num_topk > limits.MAX_TOPK:
        return f"a token has at most {limits.MAX_TOPK} choices, got {num_topk}"
    if spec.num_experts >= limits.MAX_PACKET_EXPERTS:
        return f"num_experts must be below {limits.MAX_PACKET_EXPERTS}, got {spec.num_experts}"
    size = native_modules.load("cuda").low_latency_table_bytes(
        layout=spec.layout.code,
        num_experts=spec.num_experts,
        num_ranks=spec.group.num_ranks,
        num_tokens=num_tokens,
        num_topk=num_topk,
    )
    if size > limits.MAX_LOW_LATENCY_TABLE:
        return f"the table of choices has {size} bytes, at most {limits.MAX_LOW_LATENCY_TABLE}"
    return None
