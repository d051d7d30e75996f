"""low_latency_dispatch: the dispatch of a decoding step, with the results of dispatch."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jax_ep._src.base import config
from jax_ep._src.base.errors import ConfigError, ShapeError
from jax_ep._src.base.handle import Dispatched
from jax_ep._src.base.options import (
    BackendName,
    ExchangeMode,
    Layout,
    LowLatencyLayout,
    LowLatencyLayoutName,
    Quantize,
    QuantizeName,
)
from jax_ep._src.base.spec import DispatchResults, DispatchSpec
from jax_ep._src.group.group import Group
from jax_ep._src.ops.common.checks import Checks
from jax_ep._src.ops.common.few_tokens import require_dispatch
from jax_ep._src.ops.common.vary import vary_alike
from jax_ep._src.ops.dispatch import vjp
from jax_ep._src.ops.dispatch.api import assemble, prepare
from jax_ep._src.ops.dispatch.capacity import recv_capacity as compute_capacity
from jax_ep._src.ops.dispatch.fp8 import FP8_DTYPES

_check = Checks("low_latency_dispatch")
_OPAQUE_DTYPES = (*FP8_DTYPES, jnp.uint8)


def low_latency_dispatch(
    x: jax.Array | tuple[jax.Array, jax.Array],
    topk_idx: jax.Array,
    topk_weights: jax.Array | None = None,
    *,
    group: Group,
    num_experts: int,
    max_tokens_per_rank: int,
    recv_capacity: int | None = None,
    layout: LowLatencyLayoutName = "expert",
    quantize: QuantizeName | None = None,
    payload: jax.Array | None = None,
    rank_mask: jax.Array | None = None,
    num_sms: int | None = None,
    backend: BackendName | None = None,
) -> Dispatched:
    """Sends each token of a decoding step to the ranks that own its experts.

    The results are those of `dispatch` with `fill="padding"`. On the `cuda` back end one kernel
    sends the choices and the rows of the tokens to the peers' memory, where every row has a place
    that no other rank's choices move. So no rank waits for counts before it sends.

    Args:
      x: [num_tokens, hidden] bf16, f16 or f32, or a pair ([num_tokens, hidden] fp8 or uint8, scales
        [num_tokens, S] of any type of whole bytes), moved unchanged: mxfp8 or nvfp4 blocks are
        bytes. A row of x is a multiple of 16 bytes. Every rank has the same num_tokens; mask unused
        tokens with -1 in topk_idx.
      topk_idx: [num_tokens, num_topk] int32 or int64, as in dispatch.
      topk_weights: [num_tokens, num_topk] of any floating dtype, which travel as f32; or None.
      group: the ranks. Static.
      num_experts: experts of the whole group, a multiple of its ranks. Static.
      max_tokens_per_rank: the most tokens of any call; recv_capacity and the layout "batched"
        depend on it, not on num_tokens. Static.
      recv_capacity: rows that this rank can receive; None: the worst case. With fewer rows the
        kernels of `dispatch` carry the call. Not for "batched".
      layout: "expert" and "rank" as in dispatch; "batched": x is [num_local_experts, num_ranks *
        max_tokens_per_rank, hidden], the rows of each expert begin at its first row, and
        group_sizes says how many there are.
      quantize: None; "fp8": rows are rounded to float8_e4m3fn, with an f32 scale for 128 elements;
        "fp8_pow2": scales are powers of two; "fp8_e8m0": these as exponent bytes. hidden is a
        multiple of 128 then.
      payload: [num_tokens, P] of any type of whole bytes, moved with the rows unchanged; or None.
      rank_mask: [num_ranks] bool, equal on all ranks that are alive: False leaves a rank out.
        Choices of its experts count as -1, and so do all choices of its own tokens. On the `cuda`
        back end nobody waits for it; a peer that does not answer within the group's timeout is
        left out as well, instead of ending the group; and a rank that was left out once stays so
        in all calls of the group until it is opened again. None: every rank takes part, and a peer
        that does not answer ends the group.
      num_sms: SMs that the kernel uses on the `cuda` back end; None: the group's num_sms, or all.
        Static.
      backend: "cpu", "cuda" or "xla"; None: the group's.

    Returns:
      Dispatched, with the handle that `low_latency_combine` and `combine` take. In the layout
      "batched" x, scales, payload and weights have [num_local_experts, num_ranks *
      max_tokens_per_rank] in the place of [recv_capacity]. With rank_mask, `rank_mask` of the
      result says which ranks took part. Rows of a rank that was lost amid the call may be zero.

    Collective: every rank of the group calls it, inside jax.shard_map over the group's mesh.
    Gradient: none: jax.grad raises ConfigError.
    Batches: `jax.vmap` makes one call for each element, in order.
    Limits: what a rank sends to another must fit into the group's memory: `low_latency_bytes` of
      `Group.open`. On the `cuda` back end 32 ranks, num_topk 32, and a table of choices of 96 KiB,
      which holds about 400,000 tokens times experts, and at most 4,900 experts, in the expert
      layout; in the rank layout 786,000 tokens times num_ranks squared. If tokens name an expert
      twice, a call is slow there. With rank_mask it takes no recv_capacity below the worst case.
    Raises: ShapeError, DTypeError, ConfigError, GroupError while tracing; PeerTimeoutError,
      GroupError and RoutingError (debug mode) from `group.check()`.
    Source: DeepEP (DeepSeek, 2025), low-latency kernels; TensorRT-LLM's one-sided exchange (2025).
      Rank masks: DeepEP #370, TensorRT-LLM (2026), FlashInfer's fault tolerance (2026).
    """
    group = _check.group(group)
    routing = prepare_low_latency(
        _check,
        x,
        topk_idx,
        topk_weights,
        group=group,
        num_experts=num_experts,
        max_tokens_per_rank=max_tokens_per_rank,
        recv_capacity=recv_capacity,
        layout=layout,
        quantize=quantize,
        payload=payload,
        num_sms=num_sms,
        backend=backend,
    )
    spec, rows, topk_weights, topk_idx, has_scales = routing
    mask = _check.rank_mask(rank_mask, group)
    require_dispatch(spec, topk_idx.shape, rows, leaves_out=mask is not None)
    rows, topk_weights, topk_idx, mask = vary_alike((rows, topk_weights, topk_idx, mask), group)
    routed = vjp.dispatch(spec, rows, topk_weights, topk_idx, mask)
    return assemble_low_latency(spec, topk_idx, routed, has_scales=has_scales)


class LowLatencyRouting(NamedTuple):
    """The checked arguments of a low-latency dispatch."""

    spec: DispatchSpec
    rows: tuple[jax.Array, ...]
    topk_weights: jax.Array | None
    topk_idx: jax.Array
    has_scales: bool


def prepare_low_latency(
    check: Checks,
    x: Any,
    topk_idx: Any,
    topk_weights: Any,
    *,
    group: Any,
    num_experts: Any,
    max_tokens_per_rank: Any,
    recv_capacity: Any,
    layout: Any,
    quantize: Any,
    payload: Any,
    num_sms: int | None,
    backend: str | None,
) -> LowLatencyRouting:
    """Checks the arguments of a low-latency dispatch, but not whether the group has room for it."""
    group = check.group(group)
    arrangement = check.choice(LowLatencyLayout, layout, name="layout")
    given = Quantize.NONE if quantize is None else quantize
    how = check.choice(Quantize, given, name="quantize")
    rows = _streams(check, x, payload, how)
    num_tokens = rows[0].shape[0]
    most = check.integer(max_tokens_per_rank, minimum=1, name="max_tokens_per_rank")
    if num_tokens > most:
        raise ConfigError(
            f"{check.op}: x must have at most max_tokens_per_rank={most} tokens, got {num_tokens}"
        )
    num_experts = check.num_experts(num_experts, group)
    is_batched = arrangement is LowLatencyLayout.BATCHED
    in_rows = Layout.RANK if arrangement is LowLatencyLayout.RANK else Layout.EXPERT
    stride = group.num_ranks * most if is_batched else 0
    if is_batched:
        if recv_capacity is not None:
            raise ConfigError(
                f"{check.op}: recv_capacity must be left out with layout='batched', "
                f"got {recv_capacity}"
            )
        recv_capacity = stride * (num_experts // group.num_ranks)
    elif recv_capacity is None:
        ids = check.topk_idx(topk_idx, num_experts=num_experts)
        recv_capacity = compute_capacity(
            num_tokens=most,
            num_topk=ids.shape[1],
            num_experts=num_experts,
            num_ranks=group.num_ranks,
            layout=in_rows,
            balance=None,
        )
    spec, topk_idx, topk_weights = prepare(
        check,
        topk_idx,
        topk_weights,
        num_tokens=num_tokens,
        group=group,
        num_experts=num_experts,
        layout=in_rows,
        recv_capacity=recv_capacity,
        expert_alignment=1,
        fill="padding",
        num_sms=num_sms,
        backend=backend,
        expert_stride=stride,
        quantize=how,
        mode=ExchangeMode.LOW_LATENCY,
    )
    has_scales = how is not Quantize.NONE or isinstance(x, tuple)
    return LowLatencyRouting(spec, rows, topk_weights, topk_idx, has_scales)


def assemble_low_latency(
    spec: DispatchSpec, topk_idx: jax.Array, routed: DispatchResults, *, has_scales: bool
) -> Dispatched:
    """Makes the caller's result, handle included, from the results of a back end."""
    return _batched(spec, assemble(spec, topk_idx, routed, has_scales=has_scales))


def _streams(check: Checks, x: Any, payload: Any, quantize: Quantize) -> tuple[jax.Array, ...]:
    """Returns the arrays that travel, one row per token: x, its scales, the payload."""
    if isinstance(x, tuple):
        if len(x) != 2 or quantize is not Quantize.NONE:
            raise ConfigError(
                f"{check.op}: x must be an array, or with quantize=None a pair, "
                f"got {len(x)} arrays with quantize={quantize.value!r}"
            )
        first = check.rows(x[0], name="x[0]", dtypes=_OPAQUE_DTYPES)
        rows = [first, check.stream(x[1], first.shape[0], name="scales")]
    else:
        rows = [check.rows(x, name="x")]
        if quantize is not Quantize.NONE and rows[0].shape[1] % config.FP8_BLOCK:
            raise ShapeError(
                f"{check.op}: x must be [num_tokens, hidden] with hidden a multiple of "
                f"{config.FP8_BLOCK} for quantize={quantize.value!r}, got shape {rows[0].shape}"
            )
    if payload is not None:
        rows.append(check.stream(payload, rows[0].shape[0], name="payload"))
    return tuple(rows)


def _batched(spec: DispatchSpec, out: Dispatched) -> Dispatched:
    """Gives the arrays of rows a dimension for the local experts, in the layout "batched"."""
    if not spec.expert_stride:
        return out
    shape = (spec.num_local_experts, spec.expert_stride)

    def split(a: jax.Array | None) -> jax.Array | None:
        return None if a is None else a.reshape(*shape, *a.shape[1:])

    assert out.x.shape[0] == math.prod(shape)
    return Dispatched(
        x=out.x.reshape(*shape, *out.x.shape[1:]),
        scales=split(out.scales),
        payload=split(out.payload),
        topk_idx=out.topk_idx,
        weights=split(out.weights),
        group_sizes=out.group_sizes,
        num_recv=out.num_recv,
        num_dropped=out.num_dropped,
        num_invalid=out.num_invalid,
        handle=out.handle,
        rank_mask=out.rank_mask,
    )
