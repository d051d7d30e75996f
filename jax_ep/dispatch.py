"""dispatch: sends each token to the ranks that own its experts."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jax_ep import _checks, _differentiable, _jax_compat, config
from jax_ep._primitives.without_tangent import without_tangent
from jax_ep._spec import CombineSpec, DispatchSpec, Routed
from jax_ep.config import Fill, Layout
from jax_ep.errors import ConfigError, DTypeError, GroupError
from jax_ep.fp8 import FP8_DTYPES, SCALE_DTYPES
from jax_ep.group import Group
from jax_ep.handle import Dispatched, DispatchHandle

_OP = "dispatch"
_NO_FP8_GRADIENT = (
    f"{_OP}: fp8 rows cannot be differentiated, their cotangent would be rounded to fp8; "
    "use jax_ep.dispatch_fp8, or jax.lax.stop_gradient"
)


def dispatch(
    x: jax.Array | tuple[jax.Array, jax.Array],
    topk_idx: jax.Array | None = None,
    topk_weights: jax.Array | None = None,
    *,
    group: Group | None = None,
    num_experts: int | None = None,
    layout: str = "rank",
    recv_capacity: int | None = None,
    expert_alignment: int = 1,
    fill: str = "zeros",
    payload: jax.Array | None = None,
    handle: DispatchHandle | None = None,
    num_sms: int | None = None,
    backend: str | None = None,
) -> Dispatched:
    """Sends each token to the ranks that own its experts.

    Expert `e` lives on rank `e // num_local_experts`; for another placement permute the ids first.
    The order of the received rows depends on the routing alone, never on timing, and is the same
    on every back end.

    Args:
      x: [num_tokens, hidden] bf16, f16 or f32, or a pair (fp8 [num_tokens, hidden], scales
        [num_tokens, S] f32, uint8 or float8_e8m0fnu), as `quantize_fp8` makes it; hidden * itemsize
        a multiple of 16 bytes. The same num_tokens on every rank; mask with -1 in topk_idx.
      topk_idx: [num_tokens, num_topk] int32 or int64. Global expert ids; -1 sends nothing. Other
        ids outside [0, num_experts) are counted in num_invalid and ignored; one expert twice in a
        token is the caller's error (debug mode finds both). None with `handle`.
      topk_weights: [num_tokens, num_topk] f32, moved along with the rows; or None.
      group: the ranks. Static.
      num_experts: experts of the whole group, a multiple of its ranks. Static.
      layout: "rank": one row per (token, rank), ordered by (source rank, token).
        "expert": one row per (token, expert), grouped by local expert, each group ordered by
        (source rank, token); feeds `jax.lax.ragged_dot` as it is.
      recv_capacity: rows this rank can receive. Rank layout: default num_tokens * num_ranks, the
        worst case. Expert layout: required, see `jax_ep.recv_capacity`. What does not fit is
        dropped: the longest prefix of whole tokens in (source rank, token) order is kept.
      expert_alignment: expert layout: each group is padded to a multiple of it.
      fill: "zeros": every row of x without a token is zero, so that no NaN can leak; "padding":
        only the alignment padding is; "none": neither. Index arrays and weights are always set.
      payload: [num_tokens, P] of any type of whole bytes, moved along unchanged; or None.
      handle: of an earlier dispatch: sends x and payload along its routing. Takes no argument that
        says something of the routing; all rows without a token are zero.
      num_sms: SMs that the call and its gradient use on the `cuda` back end; None: what the group's
        budgets say of this operation and layout. Static.
      backend: "cpu", "cuda" or "xla"; None: the group's, but `xla` where "auto" chose that one,
        num_sms is None, and the budgets say that `xla` is faster.

    Returns:
      Dispatched, with the handle that `combine` takes; topk_idx and weights are None where the
      routing came with `handle`.

    Collective: every rank of the group calls it. Inside jax.shard_map over the group's mesh.
    Gradient: of x, the `combine` of the cotangent; of topk_weights, the cotangent of `weights`
      moved back to the tokens. Dropped rows have none. ConfigError is raised by
      derivatives of fp8 rows, scales and payload, and by second derivatives; `dispatch_fp8` has a
      gradient.
    Batches: `jax.vmap` makes one call for each element, in order.
    Limits: num_ranks * num_topk * max(recv_capacity, num_tokens) below 2^31; on the `cuda` back end
      32 ranks, num_topk 32, and about 4,000 experts in the expert layout.
    Raises: ShapeError, DTypeError, ConfigError, GroupError while tracing; PeerTimeoutError,
      GroupError and RoutingError (debug mode) from `group.check()`.
    Source: DeepEP (DeepSeek, 2025), normal kernels; expert-major output as in Hybrid-EP.
    """
    if handle is not None:
        _checks.require_handle(handle, op=_OP)
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
            raise ConfigError(f"{_OP}: with handle= the routing is known, got also {extra}")
        return _dispatch_along(x, payload, handle, group=group, num_sms=num_sms, backend=backend)
    group = _checks.require_group(group, op=_OP)
    rows = _require_streams(x, payload)
    spec, topk_idx, topk_weights = prepare(
        topk_idx,
        topk_weights,
        num_tokens=rows[0].shape[0],
        op=_OP,
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
    routed = _differentiable.dispatch(spec, rows, topk_weights, topk_idx)
    return assemble(spec, topk_idx, routed, has_scales=isinstance(x, tuple))


def prepare(
    topk_idx: Any,
    topk_weights: Any,
    *,
    num_tokens: int,
    op: str,
    group: Group,
    num_experts: Any,
    layout: str,
    recv_capacity: int | None,
    expert_alignment: int,
    fill: str,
    num_sms: int | None,
    backend: str | None,
) -> tuple[DispatchSpec, jax.Array, jax.Array | None]:
    """Checks the routing arguments of a dispatch; the spec, the ids as int32, and the weights."""
    num_experts = _checks.require_num_experts(num_experts, group, op=op)
    topk_idx = _checks.require_topk_idx(topk_idx, num_experts=num_experts, op=op)
    num_topk = topk_idx.shape[1]
    _checks.require_shape(topk_idx, (num_tokens, num_topk), op=op, argument="topk_idx")
    if topk_weights is not None:
        _checks.require_array(topk_weights, op=op, argument="topk_weights")
        _checks.require_shape(topk_weights, topk_idx.shape, op=op, argument="topk_weights")
        _checks.require_dtype(topk_weights, (jnp.float32,), op=op, argument="topk_weights")
        topk_weights = jnp.asarray(topk_weights)
    arrangement = config.choice(Layout, layout, op=op, argument="layout")
    spec = DispatchSpec(
        group=group.spec,
        routes=_checks.require_routes(backend, num_sms, group, arrangement, op=op),
        layout=arrangement,
        num_experts=num_experts,
        recv_capacity=_capacity(layout, recv_capacity, num_tokens, num_topk, group, op=op),
        op=op,
        expert_alignment=_alignment(layout, expert_alignment, num_experts, op=op),
        fill=config.choice(Fill, fill, op=op, argument="fill"),
    )
    _checks.report_bad_routing(topk_idx, num_experts=num_experts, group=group, op=op)
    return spec, topk_idx, topk_weights


def assemble(
    spec: DispatchSpec, topk_idx: jax.Array, routed: Routed, *, has_scales: bool
) -> Dispatched:
    """What the caller gets, handle included, from what a back end gives."""
    handle = DispatchHandle(
        recv_src=routed.recv_src,
        recv_k=routed.recv_k,
        send_row=routed.send_row,
        send_rank=_differentiable.send_rank(spec, topk_idx, routed.send_row),
        group_sizes=routed.group_sizes,
        num_recv=routed.num_recv,
        num_dropped=routed.num_dropped,
        num_invalid=routed.num_invalid,
        layout=spec.layout.name.lower(),
        num_experts=spec.num_experts,
        recv_capacity=spec.recv_capacity,
        group=spec.group.identity,
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
    found = _checks.require_handle(handle, op=_OP)
    if group is not None and group is not found:
        raise GroupError(
            f"{_OP}: the handle is of group {found.identity}, got group={group.identity}"
        )
    rows = _require_streams(x, payload)
    num_tokens = handle.send_row.shape[0]
    _checks.require_shape(rows[0], (num_tokens, rows[0].shape[1]), op=_OP, argument="x")
    layout = Layout[handle.layout.upper()]
    routes = _checks.require_routes(backend, num_sms, found, layout, op=_OP)
    spec = CombineSpec(found.spec, routes, layout, handle.recv_capacity, _OP)
    rows, index = vary_alike((rows, handle.index()), found)
    moved = _differentiable.dispatch_along(spec, rows, index)
    return _as_dispatched(moved, handle, has_scales=isinstance(x, tuple))


def vary_alike(operands: Any, group: Group) -> Any:
    """The arrays of a pytree, cast to vary over the group and over what any of them varies over.

    No derivative flows through integers.
    """
    leaves, structure = jax.tree.flatten(jax.tree.map(jnp.asarray, operands))
    leaves = [without_tangent(a) if jnp.issubdtype(a.dtype, jnp.integer) else a for a in leaves]
    return jax.tree.unflatten(structure, _jax_compat.vary_alike(leaves, group.axes))


def _require_streams(x: Any, payload: Any) -> tuple[jax.Array, ...]:
    """Everything that travels, one row per token: x, its scales, the payload."""
    others: list[tuple[str, Any, Sequence[Any] | None, str]] = []
    if not isinstance(x, tuple):
        rows = [_checks.require_rows(x, op=_OP, argument="x")]
    else:
        if len(x) != 2:
            raise DTypeError(f"{_OP}: x must be an array or a pair, got {len(x)} arrays")
        fp8 = _checks.require_rows(x[0], op=_OP, argument="x[0]", dtypes=FP8_DTYPES)
        rows = [_differentiable.refuse_gradient(_NO_FP8_GRADIENT, fp8)]
        others.append(("scales", x[1], SCALE_DTYPES, _NO_FP8_GRADIENT))
    if payload is not None:
        no_gradient = f"{_OP}: payload cannot be differentiated; use jax.lax.stop_gradient"
        others.append(("payload", payload, None, no_gradient))
    for name, stream, dtypes, message in others:
        moved = _checks.require_stream(
            stream, rows[0].shape[0], op=_OP, argument=name, dtypes=dtypes
        )
        rows.append(_differentiable.refuse_gradient(message, moved))
    return tuple(rows)


def _capacity(
    layout: str, recv_capacity: int | None, num_tokens: int, num_topk: int, group: Group, *, op: str
) -> int:
    if recv_capacity is None:
        if layout == "expert":
            raise ConfigError(
                f"{op}: recv_capacity is required with layout='expert'; jax_ep.recv_capacity "
                "computes it"
            )
        recv_capacity = num_tokens * group.num_ranks
    capacity = config.require_int(recv_capacity, minimum=1, op=op, argument="recv_capacity")
    # Places of choices are computed in int32, over all ranks.
    largest = group.num_ranks * num_topk * max(capacity, num_tokens)
    if largest > config.MAX_INDEX:
        raise ConfigError(
            f"{op}: num_ranks * num_topk * max(recv_capacity, num_tokens) must be at most "
            f"{config.MAX_INDEX}, got {largest}"
        )
    return capacity


def _alignment(layout: str, expert_alignment: int, num_experts: int, *, op: str) -> int:
    alignment = config.require_int(expert_alignment, minimum=1, op=op, argument="expert_alignment")
    if layout == "rank" and alignment != 1:
        raise ConfigError(f"{op}: expert_alignment needs layout='expert', got {alignment}")
    if alignment > config.MAX_INDEX // num_experts:
        raise ConfigError(
            f"{op}: num_experts * expert_alignment must be at most {config.MAX_INDEX}, "
            f"got {num_experts} * {alignment}"
        )
    return alignment
