"""combine: brings the rows of a dispatch back to their tokens and adds them."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jax_ep._src.base import config
from jax_ep._src.base.errors import ConfigError, ShapeError
from jax_ep._src.base.handle import DispatchHandle
from jax_ep._src.base.options import BackendName, ExchangeMode, Layout, Quantize
from jax_ep._src.base.spec import RouteSpec, RowIndex
from jax_ep._src.group.group import Group
from jax_ep._src.ops.combine import vjp
from jax_ep._src.ops.common.checks import Checks
from jax_ep._src.ops.common.few_tokens import require_combine
from jax_ep._src.ops.common.vary import vary_alike
from jax_ep._src.ops.pull_rows.vjp import pull_to_rows, pull_to_tokens

_check = Checks("combine")


def combine(
    rows: jax.Array,
    handle: DispatchHandle,
    *,
    weights: jax.Array | None = None,
    bias: jax.Array | Sequence[jax.Array] | None = None,
    num_sms: int | None = None,
    backend: BackendName | None = None,
) -> jax.Array:
    """Brings the rows of a dispatch back to their tokens and adds them.

    Products and sums are f32, in a fixed order, and never contracted, so every back end and every
    run gives the same bits. Rank layout: the sum over ranks in rank order, rounded once. Expert
    layout: each rank adds weight * row in expert order and rounds the sum to the rows' dtype; the
    sum of these over ranks, in rank order, is rounded again. Biases are added last, before the
    final rounding. Dropped rows count as zero.

    In a group with several nodes each node makes such a sum of its ranks, in the rows' dtype. These
    sums cross, one for each node of a token, and are added in node order, before the biases.

    Args:
      rows: [recv_capacity, hidden] bf16, f16 or f32, in the layout of the handle; hidden * itemsize
        a multiple of 16 bytes. After a low-latency dispatch in the layout "batched" also
        [num_local_experts, rows of an expert, hidden], and weights like `Dispatched.weights`.
      handle: handle of the dispatch.
      weights: expert layout only: [recv_capacity] at the rows, like `Dispatched.weights`, or
        [num_tokens, num_topk] at the tokens, of any floating dtype, used as f32. None: 1. In the
        rank layout the caller weights and sums its experts before.
      bias: one or two arrays [num_tokens, hidden] of the rows' dtype, added to the result.
      num_sms: SMs that the call and its gradient use on the `cuda` back end; None: the number in
        the group's budgets for this exchange and layout, or up to 64 for up to 128 tokens, which
        then take the kernels of `low_latency_combine` if the group has one node. Static.
      backend: "cpu", "cuda" or "xla"; None: as in dispatch. Every back end takes every handle of
        its group.

    Returns:
      [num_tokens, hidden] of the rows' dtype.

    Collective: every rank of the group calls it, inside jax.shard_map over the group's mesh.
    Gradient: of rows, the dispatch of the cotangent along the handle, times the weight; of
      weights, the row-wise dot product in f32, in the shape of the weights; of bias, the
      cotangent. Without weights, combine is the transpose of dispatch.
    Raises: ShapeError, DTypeError, ConfigError, GroupError while tracing; PeerTimeoutError and
      GroupError from `group.check()`.
    Source: DeepEP (DeepSeek, 2025), normal kernels, with sums in f32 and in a fixed order.
    """
    return combine_rows(
        _check,
        rows,
        weights,
        handle,
        bias=bias,
        num_sms=num_sms,
        backend=backend,
    )[0]


def combine_rows(
    check: Checks,
    rows: Any,
    weights: Any,
    handle: DispatchHandle,
    *,
    bias: Any,
    num_sms: int | None,
    backend: str | None,
    mode: ExchangeMode | None = None,
    wire: Quantize = Quantize.NONE,
) -> tuple[jax.Array, jax.Array | None]:
    """Checks the arguments of a combine, and combines.

    `mode`: None: as `check.plain_mode` says. Returns also the mask of ranks after the call; None
    without a mask.
    """
    is_few = mode is ExchangeMode.LOW_LATENCY
    operands = prepare_combine(
        check,
        rows,
        weights,
        handle,
        bias=bias,
        num_sms=num_sms,
        backend=backend,
        mode=mode,
        wire=wire,
        may_leave_out=is_few,
    )
    spec, rows, weights, biases, index, group = operands
    if is_few:
        require_combine(spec, index, rows)
    rows, weights, biases, index = vary_alike((rows, weights, biases, index), group)
    if index.rank_mask is None:
        return vjp.combine(spec, rows, to_rows(spec, weights, index), biases, index), None
    if weights is not None and weights.ndim == 2:
        raise ConfigError(
            f"{check.op}: after a dispatch with rank_mask weights must be at the rows, like "
            "Dispatched.weights: all ranks are needed to move them there"
        )
    return vjp.combine_living(spec, rows, weights, biases, index)


class CombineOperands(NamedTuple):
    """The checked arguments of a combine. `weights`: at the rows or at the tokens."""

    spec: RouteSpec
    rows: jax.Array
    weights: jax.Array | None
    biases: tuple[jax.Array, ...]
    places: RowIndex
    group: Group


def prepare_combine(
    check: Checks,
    rows: Any,
    weights: Any,
    handle: DispatchHandle,
    *,
    bias: Any,
    num_sms: int | None,
    backend: str | None,
    mode: ExchangeMode | None,
    wire: Quantize,
    may_leave_out: bool = False,
) -> CombineOperands:
    """Checks the arguments of a combine, but not whether the group has room for it.

    `may_leave_out`: whether the handle may be of a dispatch with a mask of ranks.
    """
    group, layout = check.handle(handle, may_leave_out=may_leave_out)
    rows = check.rows(_flat(rows, handle, 3), name="rows", count="recv_capacity")
    if rows.shape[0] != handle.recv_capacity:
        raise ShapeError(
            f"{check.op}: rows must be [recv_capacity={handle.recv_capacity}, hidden] for this "
            f"handle (layout={layout.value!r}), got shape {rows.shape}"
        )
    biases = as_biases(check, bias, rows, handle.send_row.shape[0])
    weights = _as_weights(check, _flat(weights, handle, 2), handle, layout)
    spec = RouteSpec(
        group=group.spec,
        routes=check.routes(backend, num_sms, group, layout, mode),
        mode=mode or check.plain_mode(num_sms, group),
        few_sms=group.num_sms if num_sms is None else num_sms,
        layout=layout,
        recv_capacity=handle.recv_capacity,
        op=check.op,
        wire=wire,
    )
    if wire is not Quantize.NONE and rows.shape[1] % config.FP8_BLOCK:
        raise ShapeError(
            f"{check.op}: rows must be [recv_capacity, hidden] with hidden a multiple of "
            f"{config.FP8_BLOCK} with wire={wire.value!r}, got shape {rows.shape}"
        )
    return CombineOperands(spec, rows, weights, biases, handle.index(), group)


def _flat(array: Any, handle: DispatchHandle, num_dims: int) -> Any:
    """Returns rows or weights without the dimension of the local experts."""
    if getattr(array, "ndim", None) != num_dims:
        return array
    num_local, num_rows = array.shape[:2]
    sizes = getattr(handle.group_sizes, "shape", None)
    is_batched = sizes == (num_local,) and num_local * num_rows == handle.recv_capacity
    # Weights [num_tokens, num_topk] have two dimensions, too.
    if not is_batched or (num_dims == 2 and array.shape == handle.send_row.shape):
        return array
    return array.reshape(num_local * num_rows, *array.shape[2:])


def as_biases(check: Checks, bias: Any, rows: jax.Array, num_tokens: int) -> tuple[jax.Array, ...]:
    given = () if bias is None else bias if isinstance(bias, (tuple, list)) else (bias,)
    if len(given) > config.MAX_BIASES:
        raise ConfigError(
            f"{check.op}: bias takes at most {config.MAX_BIASES} arrays, got {len(given)}"
        )
    biases = tuple(check.array(b, name="bias") for b in given)
    for b in biases:
        check.shape(b, (num_tokens, rows.shape[1]), name="bias")
        check.dtype(b, (rows.dtype,), name="bias")
    return biases


def _as_weights(
    check: Checks, weights: Any, handle: DispatchHandle, layout: Layout
) -> jax.Array | None:
    if weights is None:
        return None
    if layout is Layout.RANK:
        raise ConfigError(
            f"{check.op}: weights need a handle of layout='expert', got layout='rank': in the "
            "rank layout the caller weights and sums its experts"
        )
    given: jax.Array = check.weights(weights, name="weights")
    at_rows, at_tokens = (handle.recv_capacity,), handle.send_row.shape
    if given.shape not in (at_rows, at_tokens):
        raise ShapeError(
            f"{check.op}: weights must have shape {at_rows} (at the rows) or {at_tokens} "
            f"(at the tokens), got {given.shape}"
        )
    return given


def to_rows(spec: RouteSpec, weights: jax.Array | None, index: RowIndex) -> jax.Array | None:
    """Returns the weights at the rows, [C]. Moves those at the tokens, [T, K]."""
    if weights is None or weights.ndim == 1:
        return weights
    from_tokens, from_rows = _places(spec, index)
    moved = pull_to_rows(spec, weights.reshape(-1, 1), from_tokens, from_rows.reshape(-1))
    return moved[:, 0]


def _places(spec: RouteSpec, index: RowIndex) -> tuple[jax.Array, jax.Array]:
    """Returns [C], the choice of each row, and [T, K], the row of each choice; -1 = none.

    Both count over all ranks, as pull_rows does. One is the inverse of the other. Expert layout
    only.
    """
    send_rank, send_row, recv_src, recv_k, _ = index
    assert send_rank is not None
    assert recv_k is not None
    choice = jnp.where(recv_src >= 0, recv_src * send_row.shape[1] + recv_k, -1)
    row = jnp.where(send_row >= 0, send_rank * spec.recv_capacity + send_row, -1)
    return choice, row


def combine_weights(
    w: jax.Array, handle: DispatchHandle, *, backend: BackendName | None = None
) -> jax.Array:
    """Brings one number per choice back to the tokens: the reverse of the move of topk_weights.

    Args:
      w: any floating dtype, moved as f32; rank layout: [recv_capacity, num_topk], expert layout:
        [recv_capacity].
      handle: handle of the dispatch.
      backend: "cpu", "cuda" or "xla"; None: as in dispatch.

    Returns:
      [num_tokens, num_topk] f32. Rank layout: the sum over ranks, in rank order, of the token's
      rows of w. If w is 0 for experts of other ranks, like `Dispatched.weights`, the sum is the
      number at the one rank that has the expert. Dropped rows count as zero.

    Collective: every rank of the group calls it, inside jax.shard_map over the group's mesh.
    Gradient: of w, the cotangent moved to the rows.
    Raises: ShapeError, DTypeError, ConfigError, GroupError while tracing; PeerTimeoutError and
      GroupError from `group.check()`.
    Source: DeepEP (DeepSeek, 2025): the top-k weights that its combine reduces.
    """
    check = Checks("combine_weights")
    group, layout = check.handle(handle)
    w = check.weights(w, name="w")
    routes = check.routes(backend, None, group, layout)
    spec = RouteSpec(
        group=group.spec,
        routes=routes,
        mode=check.plain_mode(None, group),
        few_sms=None,
        layout=layout,
        recv_capacity=handle.recv_capacity,
        op=check.op,
    )
    w, index = vary_alike((w, handle.index()), group)
    if layout is Layout.RANK:
        if w.ndim != 2 or w.shape[0] != handle.recv_capacity or w.shape[1] < 1:
            raise ShapeError(
                f"{check.op}: w must be [recv_capacity={handle.recv_capacity}, num_topk] with a "
                f"handle of layout='rank', got shape {w.shape}"
            )
        # Rows of combine must be multiples of 16 bytes.
        num_topk = w.shape[1]
        w = jnp.pad(w, ((0, 0), (0, -num_topk % (config.ROW_BYTES_MULTIPLE // w.dtype.itemsize))))
        return vjp.combine(spec, w, None, (), index)[:, :num_topk]
    check.shape(w, (handle.recv_capacity,), name="w")
    from_tokens, from_rows = _places(spec, index)
    back = pull_to_tokens(spec, w[:, None], from_rows.reshape(-1), from_tokens)
    return back.reshape(handle.send_row.shape)
