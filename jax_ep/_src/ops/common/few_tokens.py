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

_FEWEST_SMS = 16  # at least so many has every GPU for each of its ranks


class Kernels(NamedTuple):
    """The kernels that carry an exchange on GPUs, and the SMs that they use."""

    mode: ExchangeMode
    num_sms: int


def dispatch_kernels(
    spec: DispatchSpec, routing: tuple[int, ...], rows: Sequence[jax.Array]
) -> Kernels:
    """Returns the kernels for a dispatch. `routing`: the shape of topk_idx."""
    why_not = _why_no_dispatch(spec, routing, rows) if _wants_few(spec) else None
    return _choose(spec, spec.num_sms, why_not)


def combine_kernels(spec: RouteSpec, index: RowIndex, rows: jax.Array) -> Kernels:
    """Returns the kernels for a combine."""
    why_not = _why_no_combine(spec, index, rows) if _wants_few(spec) else None
    return _choose(spec, spec.num_sms, why_not)


def _wants_few(spec: ExchangeSpec) -> bool:
    return spec.mode is ExchangeMode.LOW_LATENCY


def sent_rows(rows: Sequence[jax.Array], quantize: Quantize) -> list[tuple[tuple[int, ...], Any]]:
    """Returns shape and dtype of a row of each array that a dispatch sends."""
    sent = [(r.shape[1:], r.dtype) for r in rows]
    if quantize is Quantize.NONE:
        return sent
    (hidden,), _ = sent[0]
    scales = jnp.uint8 if quantize is Quantize.FP8_E8M0 else jnp.float32
    rounded = [((hidden,), jnp.float8_e4m3fn), ((hidden // config.FP8_BLOCK,), scales)]
    return rounded + sent[1:]


def _choose(spec: ExchangeSpec, num_sms: int, why_not: str | None) -> Kernels:
    if not _wants_few(spec) or why_not is not None:
        return Kernels(ExchangeMode.THROUGHPUT, num_sms)
    return Kernels(ExchangeMode.LOW_LATENCY, spec.few_sms or config.ALL_SMS)


def require_room(op: str, why_not: str | None) -> None:
    """Raises ConfigError if the group has too little room for a low-latency operation."""
    if why_not is not None:
        raise ConfigError(f"{op}: {why_not}")


def why_no_room_to_dispatch(
    spec: DispatchSpec, routing: tuple[int, ...], rows: Sequence[jax.Array]
) -> str | None:
    """Returns why the group has no room for a dispatch of few tokens, or None."""
    num_tokens, num_topk = routing
    if _why_no_kernels(spec) is not None:
        return None
    return _why_no_room(spec, num_tokens, num_topk, rows) or _why_no_table(
        spec, num_tokens, num_topk
    )


def why_no_room_to_combine(spec: RouteSpec, index: RowIndex, rows: jax.Array) -> str | None:
    """Returns why the group has no room for a combine of few tokens, or None."""
    if _why_no_kernels(spec) is not None:
        return None
    return _why_no_room(spec, index.send_row.shape[0], 0, (rows,)) or _why_no_held_rows(spec, index)


def _why_no_dispatch(
    spec: DispatchSpec, routing: tuple[int, ...], rows: Sequence[jax.Array]
) -> str | None:
    num_tokens, num_topk = routing
    return (
        _why_no_kernels(spec)
        or _why_no_room(spec, num_tokens, num_topk, rows)
        or _why_no_table(spec, num_tokens, num_topk)
        or _why_no_capacity(spec, num_tokens, num_topk)
    )


def _why_no_combine(spec: RouteSpec, index: RowIndex, rows: jax.Array) -> str | None:
    num_tokens, num_slots = index.send_row.shape
    if spec.layout is Layout.EXPERT and index.recv_k is None:
        return "the choice of each row is not known"
    if num_slots > limits.MAX_TOPK:
        return f"a token has at most {limits.MAX_TOPK} choices, got {num_slots}"
    return (
        _why_no_kernels(spec)
        or _why_no_room(spec, num_tokens, 0, (rows,))
        or _why_no_held_rows(spec, index)
    )


def _why_no_held_rows(spec: RouteSpec, index: RowIndex) -> str | None:
    """Each block of the kernel has a table of the rows of its tokens."""
    num_tokens, num_slots = index.send_row.shape
    per_block = -(-num_tokens // min(spec.few_sms or _FEWEST_SMS, _FEWEST_SMS))
    slots = 1 if spec.layout is Layout.RANK else num_slots
    size = 4 * spec.group.num_ranks * per_block * slots
    if size <= limits.MAX_LOW_LATENCY_TABLE:
        return None
    return (
        f"the table of rows has {size} bytes with {spec.few_sms or _FEWEST_SMS} SMs, "
        f"at most {limits.MAX_LOW_LATENCY_TABLE}"
    )


def _why_no_kernels(spec: DispatchSpec | RouteSpec) -> str | None:
    if spec.backend != "cuda":
        return f"back end {spec.backend!r} has one way for all numbers of tokens"
    if not spec.group.has_packets:
        return "16 bytes do not arrive at once at all peers"
    return None


def _why_no_room(
    spec: ExchangeSpec, num_tokens: int, num_topk: int, rows: Sequence[jax.Array]
) -> str | None:
    quantize = spec.quantize if isinstance(spec, DispatchSpec) else Quantize.NONE
    sent = sent_rows(rows, quantize)
    row_bytes = [math.prod(width) * jnp.dtype(dtype).itemsize for width, dtype in sent]
    needed = limits.low_latency_payload(num_tokens, num_topk, row_bytes)
    if needed <= spec.group.low_latency_room:
        return None
    num_parts = 2 * spec.group.num_ranks
    return (
        f"a rank sends {needed} bytes to another, and the group has room for "
        f"{spec.group.low_latency_room}: open it with low_latency_bytes={num_parts * needed} or "
        "more (jax_ep.low_latency_bytes)"
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


def _why_no_capacity(spec: DispatchSpec, num_tokens: int, num_topk: int) -> str | None:
    worst = spec.worst_capacity(num_tokens, num_topk)
    if spec.recv_capacity >= worst:
        return None
    return f"rows may be dropped: recv_capacity={spec.recv_capacity}, the worst case is {worst}"
