"""The custom calls of the halves of a dispatch; xla_ffi/ops/dispatch/halves_ffi.h has handlers."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jax_ep._src.base.options import ExchangeMode, Quantize
from jax_ep._src.base.spec import DispatchResults, DispatchSpec
from jax_ep._src.ops.common import halves
from jax_ep._src.ops.common.check_mesh import check_mesh
from jax_ep._src.ops.common.few_tokens import half_sms, has_halves
from jax_ep._src.ops.common.primitive import Result, absent, make_primitive
from jax_ep._src.ops.dispatch import call
from jax_ep._src.ops.dispatch.fp8 import round_rows

Arrays = Sequence[jax.Array]


class Tokens(NamedTuple):
    """Operands that a send sends, and of which a receive reads this rank's own."""

    topk_idx: jax.Array
    topk_weights: jax.Array | None
    rows: tuple[jax.Array, ...]


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
    "dispatch_send",
    _sent,
    platforms=("cpu", "cuda"),
    attributes=("group", "has_weights", "num_experts", "num_rows", "num_sms", "quantize"),
    batch=halves.refuse_batch,
    aliases=_aliases,
    is_pure=False,
)


def _received(
    position: Any,
    flight: Any,
    topk_idx: Any,
    topk_weights: Any,
    *rows: Any,
    num_rows: int,
    **parameters: Any,
) -> Any:
    return call.results_without_workspace(
        position, topk_idx, topk_weights, *rows[:num_rows], **parameters
    )


_bind_recv = make_primitive(
    "dispatch_recv",
    _received,
    platforms=("cpu", "cuda"),
    attributes=call.ATTRIBUTES,
    batch=halves.refuse_batch,
    is_pure=False,
)


def _is_carried(spec: DispatchSpec) -> bool:
    """Returns whether the halves are custom calls."""
    return has_halves(spec) or (spec.backend == "cpu" and spec.group.staging_bytes is None)


def dispatch_send(
    spec: DispatchSpec, tokens: Tokens, after: Arrays, through: Arrays
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Sends the tokens. Returns the number of the flight, and `through`, behind the send."""
    topk_idx, topk_weights, rows = tokens
    if not _is_carried(spec):
        number = halves.no_flight((topk_idx, *rows, *after))
        return number, halves.behind(tuple(through), number)
    sent: _Sent = _bind_send(
        check_mesh(spec.group.position(), spec.group, op=spec.op),
        topk_idx,
        absent(jnp.float32) if topk_weights is None else topk_weights,
        *rows,
        *after,
        *through,
        group=spec.group.identity,
        has_weights=topk_weights is not None,
        num_experts=spec.num_experts,
        num_rows=len(rows),
        num_sms=half_sms(spec),
        num_through=len(through),
        op=spec.op,
        quantize=spec.quantize if spec.backend == "cuda" else Quantize.NONE,
    )
    return sent.flight, sent.through


def dispatch_recv(
    spec: DispatchSpec, number: jax.Array, tokens: Tokens, after: Arrays
) -> DispatchResults:
    """Receives the tokens of all ranks; where nothing was sent, makes the whole exchange."""
    topk_idx, topk_weights, rows = tokens
    if not _is_carried(spec):
        rows = halves.behind(tuple(rows), number, *after)
        return call.dispatch(spec, topk_idx, topk_weights, rows)
    is_here = spec.backend == "cpu"
    if is_here and spec.quantize is not Quantize.NONE:
        rows = (*round_rows(rows[0], spec.quantize), *rows[1:])
    results = _bind_recv(
        check_mesh(spec.group.position(), spec.group, op=spec.op),
        number,
        topk_idx,
        absent(jnp.float32) if topk_weights is None else topk_weights,
        *rows,
        *after,
        expert_alignment=spec.expert_alignment,
        expert_stride=spec.expert_stride,
        fill=spec.fill,
        group=spec.group.identity,
        has_rank_mask=False,
        has_weights=topk_weights is not None,
        layout=spec.layout,
        mode=ExchangeMode.LOW_LATENCY,
        num_experts=spec.num_experts,
        num_parts=1,
        num_ranks=spec.group.num_ranks,
        num_rows=len(rows),
        num_sms=half_sms(spec),
        op=spec.op,
        quantize=Quantize.NONE if is_here else spec.quantize,
        recv_capacity=spec.recv_capacity,
    )
    return call.as_results(spec, results, has_weights=topk_weights is not None)
