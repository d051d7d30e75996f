"""combine: brings the rows of a dispatch back to their tokens and adds them."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jax_ep import _checks, _differentiable, config
from jax_ep._spec import CombineSpec, RowIndex
from jax_ep.config import Layout
from jax_ep.dispatch import vary_alike
from jax_ep.errors import ConfigError, ShapeError
from jax_ep.handle import DispatchHandle

_OP = "combine"


def combine(
    rows: jax.Array,
    handle: DispatchHandle,
    *,
    weights: jax.Array | None = None,
    bias: jax.Array | Sequence[jax.Array] | None = None,
    num_sms: int | None = None,
    backend: str | None = None,
) -> jax.Array:
    """Brings the rows of a dispatch back to their tokens and adds them.

    Products and sums are f32, in a fixed order, never contracted, so the bits are the same on
    every back end and in every run. Rank layout: the sum over ranks, in rank order, rounded once.
    Expert layout: on each rank the sum, in expert order, of weight * row, rounded to the rows'
    dtype; then the sum of these over ranks in rank order, rounded. Biases are added last, before
    the final rounding. Dropped rows count as zero.

    Args:
      rows: [recv_capacity, hidden] bf16, f16 or f32, in the layout of the handle; hidden * itemsize
        a multiple of 16 bytes.
      handle: of the dispatch.
      weights: expert layout only: [recv_capacity] f32 at the rows, as `Dispatched.weights`, or
        [num_tokens, num_topk] f32 at the tokens. None: 1. In the rank layout the caller has
        summed, and weighted, its experts.
      bias: one or two arrays [num_tokens, hidden] of the rows' dtype, added to the result.
      num_sms: SMs that the call and its gradient use on the `cuda` back end; None: what the group's
        budgets say of this operation and layout. Static.
      backend: "cpu", "cuda" or "xla"; None: as in dispatch. Any of them takes any handle of its
        group.

    Returns:
      [num_tokens, hidden] of the rows' dtype.

    Collective: every rank of the group calls it. Inside jax.shard_map over the group's mesh.
    Gradient: of rows, the dispatch of the cotangent along the handle, times the weight; of
      weights, the row-wise dot product in f32, in the form they came in; of bias, the cotangent.
      Without weights, combine is the transpose of dispatch.
    Raises: ShapeError, DTypeError, ConfigError, GroupError while tracing; PeerTimeoutError and
      GroupError from `group.check()`.
    Source: DeepEP (DeepSeek, 2025), normal kernels, with sums in f32 and in a fixed order.
    """
    group = _checks.require_handle(handle, op=_OP)
    layout = Layout[handle.layout.upper()]
    rows = _checks.require_rows(rows, op=_OP, argument="rows", rows="recv_capacity")
    if rows.shape[0] != handle.recv_capacity:
        raise ShapeError(
            f"{_OP}: rows must be [recv_capacity={handle.recv_capacity}, hidden] as the handle "
            f"(layout={handle.layout!r}) has it, got shape {rows.shape}"
        )
    biases = _as_biases(bias, rows, handle.send_row.shape[0])
    _require_weights(weights, handle, layout)
    routes = _checks.require_routes(backend, num_sms, group, layout, op=_OP)
    spec = CombineSpec(group.spec, routes, layout, handle.recv_capacity, _OP)
    operands = (rows, weights, biases, handle.index())
    rows, weights, biases, index = vary_alike(operands, group)
    if weights is not None and weights.ndim == 2:
        weights = _to_rows(spec, weights, index)
    return _differentiable.combine(spec, rows, weights, biases, index)


def _as_biases(
    bias: jax.Array | Sequence[jax.Array] | None, rows: jax.Array, num_tokens: int
) -> tuple[jax.Array, ...]:
    given = () if bias is None else bias if isinstance(bias, (tuple, list)) else (bias,)
    if len(given) > config.MAX_BIASES:
        raise ConfigError(f"{_OP}: bias takes at most {config.MAX_BIASES} arrays, got {len(given)}")
    biases = tuple(_checks.require_array(b, op=_OP, argument="bias") for b in given)
    for b in biases:
        _checks.require_shape(b, (num_tokens, rows.shape[1]), op=_OP, argument="bias")
        _checks.require_dtype(b, (rows.dtype,), op=_OP, argument="bias")
    return biases


def _require_weights(weights: jax.Array | None, handle: DispatchHandle, layout: Layout) -> None:
    if weights is None:
        return
    if layout is Layout.RANK:
        raise ConfigError(
            f"{_OP}: weights need a handle of layout='expert', got layout='rank': in the rank "
            "layout the caller weights and sums its experts"
        )
    weights = _checks.require_array(weights, op=_OP, argument="weights")
    at_rows, at_tokens = (handle.recv_capacity,), handle.send_row.shape
    if weights.shape not in (at_rows, at_tokens):
        raise ShapeError(
            f"{_OP}: weights must have shape {at_rows} (at the rows) or {at_tokens} "
            f"(at the tokens), got {weights.shape}"
        )
    _checks.require_dtype(weights, (jnp.float32,), op=_OP, argument="weights")


def _to_rows(spec: CombineSpec, weights: jax.Array, index: RowIndex) -> jax.Array:
    """Weights [T, K] at the tokens, moved to the rows: [C]."""
    from_tokens, from_rows = _places(spec, index)
    moved = _differentiable.pull_rows(
        spec, weights.reshape(-1, 1), from_tokens, from_rows.reshape(-1)
    )
    return moved[:, 0]


def _places(spec: CombineSpec, index: RowIndex) -> tuple[jax.Array, jax.Array]:
    """Expert layout: [C] the choice that each row is, [T, K] the row of each choice; -1 = none.

    Both count over all ranks, as pull_rows does; one is the inverse of the other.
    """
    send_rank, send_row, recv_src, recv_k = index
    assert send_rank is not None
    assert recv_k is not None
    choice = jnp.where(recv_src >= 0, recv_src * send_row.shape[1] + recv_k, -1)
    row = jnp.where(send_row >= 0, send_rank * spec.recv_capacity + send_row, -1)
    return choice, row


def combine_weights(
    w: jax.Array, handle: DispatchHandle, *, backend: str | None = None
) -> jax.Array:
    """Brings one number per choice back to the tokens: the reverse of what moved topk_weights.

    Args:
      w: f32, rank layout: [recv_capacity, num_topk], expert layout: [recv_capacity].
      handle: of the dispatch.
      backend: "cpu", "cuda" or "xla"; None: as in dispatch.

    Returns:
      [num_tokens, num_topk] f32. Rank layout: the sum over ranks, in rank order, of the token's
      rows of w; where w is 0 for experts of other ranks, as `Dispatched.weights` is, that is the
      number at the one rank that has the expert. Dropped rows count as zero.

    Collective: every rank of the group calls it. Inside jax.shard_map over the group's mesh.
    Gradient: of w, the cotangent moved to the rows.
    Raises: ShapeError, DTypeError, ConfigError, GroupError while tracing; PeerTimeoutError and
      GroupError from `group.check()`.
    Source: DeepEP (DeepSeek, 2025), the top-k weights that its combine reduces.
    """
    op = "combine_weights"
    group = _checks.require_handle(handle, op=op)
    layout = Layout[handle.layout.upper()]
    w = _checks.require_array(w, op=op, argument="w")
    _checks.require_dtype(w, (jnp.float32,), op=op, argument="w")
    routes = _checks.require_routes(backend, None, group, layout, op=op)
    spec = CombineSpec(group.spec, routes, layout, handle.recv_capacity, op)
    w, index = vary_alike((w, handle.index()), group)
    if layout is Layout.RANK:
        if w.ndim != 2 or w.shape[0] != handle.recv_capacity or w.shape[1] < 1:
            raise ShapeError(
                f"{op}: w must be [recv_capacity={handle.recv_capacity}, num_topk] with a handle "
                f"of layout='rank', got shape {w.shape}"
            )
        # Whole 16 bytes, as every row that combine takes.
        num_topk = w.shape[1]
        w = jnp.pad(w, ((0, 0), (0, -num_topk % (config.ROW_BYTES_MULTIPLE // w.dtype.itemsize))))
        return _differentiable.combine(spec, w, None, (), index)[:, :num_topk]
    _checks.require_shape(w, (handle.recv_capacity,), op=op, argument="w")
    from_tokens, from_rows = _places(spec, index)
    back = _differentiable.pull_rows(spec, w[:, None], from_rows.reshape(-1), from_tokens)
    return back.reshape(handle.send_row.shape)
