"""dispatch: sends each token to the ranks that own its experts."""

from collections.abc import Sequence
from typing import Any

import jax

from jax_ep._src.base import config
from jax_ep._src.base.errors import ConfigError, DTypeError, GroupError
from jax_ep._src.base.handle import Dispatched, DispatchHandle
from jax_ep._src.base.options import (
    BackendName,
    ExchangeMode,
    Fill,
    FillName,
    Layout,
    LayoutName,
    Quantize,
)
from jax_ep._src.base.spec import DispatchResults, DispatchSpec, RouteSpec
from jax_ep._src.group.group import Group
from jax_ep._src.ops.common.checks import Checks
from jax_ep._src.ops.common.refuse_gradient import refuse_gradient
from jax_ep._src.ops.common.vary import vary_alike
from jax_ep._src.ops.dispatch import vjp
from jax_ep._src.ops.dispatch.fp8 import FP8_DTYPES, SCALE_DTYPES

_check = Checks("dispatch")
_NO_FP8_GRADIENT = (
    "dispatch: fp8 rows cannot be differentiated, their cotangent would be rounded to fp8; "
    "use jax_ep.dispatch_fp8, or jax.lax.stop_gradient"
)


def dispatch(
    x: jax.Array | tuple[jax.Array, jax.Array],
    topk_idx: jax.Array | None = None,
    topk_weights: jax.Array | None = None,
    *,
    group: Group | None = None,
    num_experts: int | None = None,
    layout: LayoutName = "rank",
    recv_capacity: int | None = None,
    expert_alignment: int = 1,
    fill: FillName = "zeros",
    payload: jax.Array | None = None,
    handle: DispatchHandle | None = None,
    num_sms: int | None = None,
    backend: BackendName | None = None,
) -> Dispatched:
    """Sends each token to the ranks that own its experts.

    Expert `e` lives on rank `e // num_local_experts`; for another placement permute the ids first.
    The order of the received rows depends on the routing alone, never on timing, and is equal on
    every back end. In a group with several nodes a token crosses once to each node where it has
    experts, and is spread there; the results are the same.

    Args:
      x: [num_tokens, hidden] bf16, f16 or f32, or a pair (fp8 [num_tokens, hidden], scales
        [num_tokens, S] f32, uint8 or float8_e8m0fnu) like the result of `quantize_fp8`; hidden *
        itemsize a multiple of 16 bytes. Every rank has the same num_tokens; mask unused tokens
        with -1 in topk_idx.
      topk_idx: [num_tokens, num_topk] int32 or int64. Global expert ids; -1 sends nothing. Other
        ids outside [0, num_experts) are counted in num_invalid and ignored. A token must not name
        an expert twice. Debug mode finds both errors. None with `handle`.
      topk_weights: [num_tokens, num_topk] of any floating dtype, which travel with the rows as
        f32; or None.
      group: the ranks. Static.
      num_experts: experts of the whole group, a multiple of its ranks. Static.
      layout: "rank": one row per (token, rank), ordered by (source rank, token).
        "expert": one row per (token, expert), grouped by local expert, each group ordered by
        (source rank, token); feeds `jax.lax.ragged_dot` as it is.
      recv_capacity: rows that this rank can receive. Rank layout: default num_tokens * num_ranks,
        the worst case. Expert layout: required, see `jax_ep.recv_capacity`. The longest prefix of
        whole tokens in (source rank, token) order that fits is kept; later rows are dropped.
      expert_alignment: expert layout: each group is padded to a multiple of it.
      fill: "zeros": every row of x without a token is zero, so that no NaN can leak. "padding":
        only the alignment padding is zero. "none": no row is filled. Index arrays and weights are
        always set.
      payload: [num_tokens, P] of any type of whole bytes, moved with the rows unchanged; or None.
      handle: handle of an earlier dispatch, along whose routing x and payload travel. Excludes
        every argument about the routing. All rows without a token are zero.
      num_sms: SMs that the call and its gradient use on the `cuda` back end; None: the number in
        the group's budgets for this exchange and layout, or up to 64 for up to 128 tokens, which
        then take the kernels of `low_latency_dispatch` if the group has one node. Static.
      backend: "cpu", "cuda" or "xla". None: the group's back end; but `xla` if "auto" chose the
        group's back end, num_sms is None, and the budgets say that `xla` is faster.

    Returns:
      Dispatched, with the handle that `combine` takes; topk_idx and weights are None if the
      routing came with `handle`.

    Collective: every rank of the group calls it, inside jax.shard_map over the group's mesh.
    Gradient: of x, the `combine` of the cotangent; of topk_weights, the cotangent of `weights`
      moved back to the tokens. Dropped rows have no gradient. Derivatives of fp8 rows, scales and
      payload raise ConfigError, and so do second derivatives; `dispatch_fp8` has a gradient.
    Batches: `jax.vmap` makes one call for each element, in order.
    Limits: num_ranks * num_topk * max(recv_capacity, num_tokens) below 2^31; on the `cuda` back end
      32 ranks of a node, num_topk 32, and about 4,000 experts in the expert layout.
    Raises: ShapeError, DTypeError, ConfigError, GroupError while tracing; PeerTimeoutError,
      GroupError and RoutingError (debug mode) from `group.check()`.
    Source: DeepEP (DeepSeek, 2025), normal kernels; expert-major output as in Hybrid-EP.
    """
    if handle is not None:
        _check.handle(handle)
        given = {
            "topk_idx": topk_idx,
            "topk_weights": topk_weights,
            "num_experts": num_experts,
            "recv_capacity": recv_capacity,
            "expert_alignment": None if expert_alignment == 1 else expert_alignment,
            "fill": None if fill == "zeros" else fill,
            "layout": None if layout in ("rank", handle.layout) else layout,
        }
        extra = ", ".join(name for name, value in given.items() if value is not None)
        if extra:
            raise ConfigError(f"{_check.op}: with handle= these must be left out: {extra}")
        return _dispatch_along(x, payload, handle, group=group, num_sms=num_sms, backend=backend)
    group = _check.group(group)
    rows = _require_streams(x, payload)
    spec, topk_idx, topk_weights = prepare(
        _check,
        topk_idx,
        topk_weights,
        num_tokens=rows[0].shape[0],
        group=group,
        num_experts=num_experts,
        layout=layout,
        recv_capacity=recv_capacity,
        expert_alignment=expert_alignment,
        fill=fill,
        num_sms=num_sms,
        backend=backend,
    )
    rows, topk_weights, topk_idx = vary_alike((rows, topk_weights, topk_idx), group)
    routed = vjp.dispatch(spec, rows, topk_weights, topk_idx, None)
    return assemble(spec, topk_idx, routed, has_scales=isinstance(x, tuple))


def prepare(
    check: Checks,
    topk_idx: Any,
    topk_weights: Any,
    *,
    num_tokens: int,
    group: Group,
    num_experts: Any,
    layout: str,
    recv_capacity: int | None,
    expert_alignment: int,
    fill: str,
    num_sms: int | None,
    backend: str | None,
    expert_stride: int = 0,
    quantize: Quantize = Quantize.NONE,
    mode: ExchangeMode | None = None,
) -> tuple[DispatchSpec, jax.Array, jax.Array | None]:
    """Checks the routing arguments of a dispatch; returns the spec, int32 ids, and the weights.

    `expert_stride`, `quantize`: as in DispatchSpec. `mode`: None: as `check.plain_mode` says.
    """
    num_experts = check.num_experts(num_experts, group)
    topk_idx = check.topk_idx(topk_idx, num_experts=num_experts)
    check.shape(topk_idx, (num_tokens, topk_idx.shape[1]), name="topk_idx")
    if topk_weights is not None:
        topk_weights = check.weights(topk_weights, name="topk_weights")
        check.shape(topk_weights, topk_idx.shape, name="topk_weights")
    arrangement = check.choice(Layout, layout, name="layout")
    spec = DispatchSpec(
        group=group.spec,
        routes=check.routes(backend, num_sms, group, arrangement, mode),
        mode=mode or check.plain_mode(num_sms, group),
        few_sms=group.num_sms if num_sms is None else num_sms,
        layout=arrangement,
        num_experts=num_experts,
        op=check.op,
        recv_capacity=_capacity(check, arrangement, recv_capacity, topk_idx.shape, group),
        expert_alignment=_alignment(check, arrangement, expert_alignment, num_experts),
        fill=check.choice(Fill, fill, name="fill"),
        expert_stride=expert_stride,
        quantize=quantize,
    )
    check.report_bad_routing(topk_idx, num_experts=num_experts, group=group)
    return spec, topk_idx, topk_weights


def assemble(
    spec: DispatchSpec, topk_idx: jax.Array, routed: DispatchResults, *, has_scales: bool
) -> Dispatched:
    """Makes the caller's result, handle included, from the results of a back end."""
    handle = DispatchHandle(
        recv_src=routed.recv_src,
        recv_k=routed.recv_k,
        send_row=routed.send_row,
        send_rank=vjp.send_rank(spec, topk_idx, routed.send_row),
        group_sizes=routed.group_sizes,
        num_recv=routed.num_recv,
        num_dropped=routed.num_dropped,
        num_invalid=routed.num_invalid,
        layout=spec.layout,
        num_experts=spec.num_experts,
        recv_capacity=spec.recv_capacity,
        group=spec.group.identity,
        rank_mask=routed.rank_mask,
    )
    return _as_dispatched(
        routed.rows, handle, routed.recv_topk_idx, routed.recv_weights, has_scales=has_scales
    )


def _as_dispatched(
    rows: Sequence[jax.Array],
    handle: DispatchHandle,
    topk_idx: jax.Array | None = None,
    weights: jax.Array | None = None,
    *,
    has_scales: bool,
) -> Dispatched:
    x, *others = rows
    return Dispatched(
        x=x,
        scales=others.pop(0) if has_scales else None,
        payload=others.pop(0) if others else None,
        topk_idx=topk_idx,
        weights=weights,
        group_sizes=handle.group_sizes,
        num_recv=handle.num_recv,
        num_dropped=handle.num_dropped,
        num_invalid=handle.num_invalid,
        handle=handle,
        rank_mask=handle.rank_mask,
    )


def _dispatch_along(
    x: Any,
    payload: Any,
    handle: DispatchHandle,
    *,
    group: Group | None,
    num_sms: int | None,
    backend: str | None,
) -> Dispatched:
    found, layout = _check.handle(handle)
    if group is not None and group is not found:
        raise GroupError(
            f"{_check.op}: the handle is of group {found.identity}, got group={group.identity}"
        )
    rows = _require_streams(x, payload)
    num_tokens = handle.send_row.shape[0]
    _check.shape(rows[0], (num_tokens, rows[0].shape[1]), name="x")
    routes = _check.routes(backend, num_sms, found, layout)
    spec = RouteSpec(
        group=found.spec,
        routes=routes,
        mode=_check.plain_mode(num_sms, found),
        few_sms=None,
        layout=layout,
        recv_capacity=handle.recv_capacity,
        op=_check.op,
    )
    rows, index = vary_alike((rows, handle.index()), found)
    moved = vjp.dispatch_along(spec, rows, index)
    return _as_dispatched(moved, handle, has_scales=isinstance(x, tuple))


def _require_streams(x: Any, payload: Any) -> tuple[jax.Array, ...]:
    """Returns the arrays that travel, one row per token: x, its scales, the payload."""
    others: list[tuple[str, Any, Sequence[Any] | None, str]] = []
    if not isinstance(x, tuple):
        rows = [_check.rows(x, name="x")]
    else:
        if len(x) != 2:
            raise DTypeError(f"{_check.op}: x must be an array or a pair, got {len(x)} arrays")
        fp8 = _check.rows(x[0], name="x[0]", dtypes=FP8_DTYPES)
        rows = [refuse_gradient(_NO_FP8_GRADIENT, fp8)]
        others.append(("scales", x[1], SCALE_DTYPES, _NO_FP8_GRADIENT))
    if payload is not None:
        no_gradient = f"{_check.op}: payload cannot be differentiated; use jax.lax.stop_gradient"
        others.append(("payload", payload, None, no_gradient))
    for name, stream, dtypes, message in others:
        moved = _check.stream(stream, rows[0].shape[0], name=name, dtypes=dtypes)
        rows.append(refuse_gradient(message, moved))
    return tuple(rows)


def _capacity(
    check: Checks,
    layout: Layout,
    recv_capacity: int | None,
    routing: tuple[int, ...],
    group: Group,
) -> int:
    """Checks recv_capacity, or returns its default. `routing`: the shape of topk_idx."""
    num_tokens, num_topk = routing
    if recv_capacity is None:
        if layout is Layout.EXPERT:
            raise ConfigError(
                f"{check.op}: recv_capacity is required with layout='expert'; jax_ep.recv_capacity "
                "computes it"
            )
        recv_capacity = num_tokens * group.num_ranks
    capacity = check.integer(recv_capacity, minimum=1, name="recv_capacity")
    # Places of choices count over all ranks, and are computed in int32.
    largest = group.num_ranks * num_topk * max(capacity, num_tokens)
    if largest > config.MAX_INDEX:
        raise ConfigError(
            f"{check.op}: num_ranks * num_topk * max(recv_capacity, num_tokens) must be at most "
            f"{config.MAX_INDEX}, got {largest}"
        )
    return capacity


def _alignment(check: Checks, layout: Layout, expert_alignment: int, num_experts: int) -> int:
    alignment = check.integer(expert_alignment, minimum=1, name="expert_alignment")
    if layout is Layout.RANK and alignment != 1:
        raise ConfigError(f"{check.op}: expert_alignment needs layout='expert', got {alignment}")
    if alignment > config.MAX_INDEX // num_experts:
        raise ConfigError(
            f"{check.op}: num_experts * expert_alignment must be at most {config.MAX_INDEX}, "
            f"got {num_experts} * {alignment}"
        )
    return alignment
