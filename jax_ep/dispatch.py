"""dispatch: sends each token to the ranks that own its experts."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jax_ep import _backends, _checks, _jax_compat, config
from jax_ep._spec import CombineSpec, DispatchSpec, Routed, RowIndex
from jax_ep.config import Fill, Layout
from jax_ep.errors import ConfigError
from jax_ep.group import Group
from jax_ep.handle import Dispatched, DispatchHandle

_OP = "dispatch"


def dispatch(
    x: jax.Array,
    topk_idx: jax.Array,
    topk_weights: jax.Array | None = None,
    *,
    group: Group,
    num_experts: int,
    layout: str = "rank",
    recv_capacity: int | None = None,
    expert_alignment: int = 1,
    fill: str = "zeros",
    backend: str | None = None,
) -> Dispatched:
    """Sends each token to the ranks that own its experts.

    Expert `e` lives on rank `e // num_local_experts`; for another placement permute the ids first.
    The order of the received rows depends on the routing alone, never on timing, and is the same
    on every back end.

    Args:
      x: [num_tokens, hidden] bf16, f16 or f32; hidden * itemsize a multiple of 16 bytes. The same
        num_tokens on every rank; mask with -1 in topk_idx.
      topk_idx: [num_tokens, num_topk] int32 or int64. Global expert ids; -1 sends nothing. Other
        ids outside [0, num_experts) are counted in num_invalid and ignored; one expert twice in a
        token is the caller's error (debug mode finds both).
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
      backend: None (the group's), "cpu" or "xla".

    Returns:
      Dispatched, with the handle that `combine` takes.

    Collective: every rank of the group calls it. Inside jax.shard_map over the group's mesh.
    Gradient: of x, the `combine` of the cotangent; of topk_weights, the cotangent of `weights`
      moved back to the tokens. Dropped rows have none.
    Raises: ShapeError, DTypeError, ConfigError, GroupError while tracing; PeerTimeoutError,
      GroupError and RoutingError (debug mode) from `group.check()`.
    Source: DeepEP (DeepSeek, 2025), normal kernels; expert-major output as in Hybrid-EP.
    """
    _checks.require_group(group, op=_OP)
    num_experts = _checks.require_num_experts(num_experts, group, op=_OP)
    x = _checks.require_rows(x, op=_OP, argument="x")
    topk_idx = _checks.require_topk_idx(topk_idx, num_experts=num_experts, op=_OP)
    num_tokens, num_topk = topk_idx.shape
    _checks.require_shape(x, (num_tokens, x.shape[1]), op=_OP, argument="x")
    if topk_weights is not None:
        topk_weights = _checks.require_array(topk_weights, op=_OP, argument="topk_weights")
        _checks.require_shape(topk_weights, topk_idx.shape, op=_OP, argument="topk_weights")
        _checks.require_dtype(topk_weights, (jnp.float32,), op=_OP, argument="topk_weights")
    spec = DispatchSpec(
        group=group.spec,
        backend=_checks.require_backend(backend, group, op=_OP),
        layout=config.choice(Layout, layout, op=_OP, argument="layout"),
        num_experts=num_experts,
        recv_capacity=_capacity(layout, recv_capacity, num_tokens, num_topk, group),
        expert_alignment=_alignment(layout, expert_alignment),
        fill=config.choice(Fill, fill, op=_OP, argument="fill"),
    )
    arrays = [x, topk_idx] if topk_weights is None else [x, topk_idx, topk_weights]
    x, topk_idx, *weights = _jax_compat.vary_alike(arrays, group.axes)
    _checks.report_bad_routing(topk_idx, num_experts=num_experts, group=group, op=_OP)
    routed = _dispatch(spec, x, weights[0] if weights else None, topk_idx)
    handle = DispatchHandle(
        recv_src=routed.recv_src,
        recv_k=routed.recv_k,
        send_row=routed.send_row,
        send_rank=_send_rank(spec, topk_idx, routed.send_row),
        group_sizes=routed.group_sizes,
        num_recv=routed.num_recv,
        layout=layout,
        num_experts=num_experts,
        recv_capacity=spec.recv_capacity,
        group=group.identity,
    )
    return Dispatched(
        x=routed.rows[0],
        topk_idx=routed.recv_topk_idx,
        weights=routed.recv_weights,
        group_sizes=routed.group_sizes,
        num_recv=routed.num_recv,
        num_dropped=routed.num_dropped,
        num_invalid=routed.num_invalid,
        handle=handle,
    )


def _capacity(
    layout: str, recv_capacity: int | None, num_tokens: int, num_topk: int, group: Group
) -> int:
    if recv_capacity is None:
        if layout == "expert":
            raise ConfigError(
                f"{_OP}: recv_capacity is required with layout='expert'; jax_ep.recv_capacity "
                "computes it"
            )
        recv_capacity = num_tokens * group.num_ranks
    capacity = _checks.require_int(recv_capacity, minimum=1, op=_OP, argument="recv_capacity")
    # Places of choices are computed in int32, over all ranks.
    largest = group.num_ranks * num_topk * max(capacity, num_tokens)
    if largest > config.MAX_INDEX:
        raise ConfigError(
            f"{_OP}: num_ranks * num_topk * max(recv_capacity, num_tokens) must be at most "
            f"{config.MAX_INDEX}, got {largest}"
        )
    return capacity


def _alignment(layout: str, expert_alignment: int) -> int:
    alignment = _checks.require_int(
        expert_alignment, minimum=1, op=_OP, argument="expert_alignment"
    )
    if layout == "rank" and alignment != 1:
        raise ConfigError(f"{_OP}: expert_alignment needs layout='expert', got {alignment}")
    return alignment


def _send_rank(spec: DispatchSpec, topk_idx: jax.Array, send_row: jax.Array) -> jax.Array | None:
    if spec.layout is Layout.RANK:
        return None
    return jnp.where(send_row >= 0, topk_idx // spec.num_local_experts, -1)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _dispatch(
    spec: DispatchSpec, x: jax.Array, topk_weights: jax.Array | None, topk_idx: jax.Array
) -> Routed:
    return _backends.get(spec.backend).dispatch(spec, topk_idx, topk_weights, (x,))


def _dispatch_fwd(
    spec: DispatchSpec, x: jax.Array, topk_weights: jax.Array | None, topk_idx: jax.Array
) -> tuple[Routed, Any]:
    routed = _backends.get(spec.backend).dispatch(spec, topk_idx, topk_weights, (x,))
    return routed, (topk_idx, routed.send_row, routed.recv_src)


def _dispatch_bwd(spec: DispatchSpec, residuals: Any, ct: Routed) -> tuple[Any, Any, None]:
    topk_idx, send_row, recv_src = residuals
    backend = _backends.get(spec.backend)
    index = RowIndex(_send_rank(spec, topk_idx, send_row), send_row, recv_src)
    back = CombineSpec(spec.group, spec.backend, spec.layout, spec.recv_capacity)
    x_bar = backend.combine(back, index, ct.rows[0], None, ())
    if ct.recv_weights is None:
        return x_bar, None, None
    place = _place_of_choice(spec, topk_idx, send_row)
    moved = backend.pull_rows(spec.group, place.reshape(-1), ct.recv_weights.reshape(-1, 1))
    return x_bar, moved.reshape(topk_idx.shape), None


def _place_of_choice(spec: DispatchSpec, topk_idx: jax.Array, send_row: jax.Array) -> jax.Array:
    """[T, K]: where the weight of a choice went, counted over all ranks' weight arrays; or -1."""
    is_expert = (topk_idx >= 0) & (topk_idx < spec.num_experts)
    rank = jnp.where(is_expert, topk_idx // spec.num_local_experts, 0)
    if spec.layout is Layout.EXPERT:
        return jnp.where(send_row >= 0, rank * spec.recv_capacity + send_row, -1)
    row = jnp.take_along_axis(send_row, rank, axis=1)
    num_topk = topk_idx.shape[1]
    choice = jnp.arange(num_topk, dtype=jnp.int32)
    place = (rank * spec.recv_capacity + row) * num_topk + choice
    return jnp.where(is_expert & (row >= 0), place, -1)


_dispatch.defvjp(_dispatch_fwd, _dispatch_bwd)
