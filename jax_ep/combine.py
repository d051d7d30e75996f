"""combine: brings the rows of a dispatch back to their tokens and adds them."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jax_ep import _backends, _checks, _jax_compat, _registry
from jax_ep._spec import CombineSpec, RowIndex
from jax_ep.config import Layout
from jax_ep.errors import ConfigError, GroupError, ShapeError
from jax_ep.handle import DispatchHandle

_OP = "combine"
_MAX_BIASES = 2


def combine(
    rows: jax.Array,
    handle: DispatchHandle,
    *,
    weights: jax.Array | None = None,
    bias: jax.Array | Sequence[jax.Array] | None = None,
    backend: str | None = None,
) -> jax.Array:
    """Brings the rows of a dispatch back to their tokens and adds them.

    Products and sums are f32, in a fixed order, never contracted, so the bits are the same on
    every back end and in every run. Rank layout: the sum over ranks, in rank order, rounded once.
    Expert layout: on each rank the sum, in expert order, of weight * row, rounded to the rows'
    dtype; then the sum of these over ranks in rank order, rounded. Biases are added last, before
    the final rounding. Dropped rows count as zero.

    Args:
      rows: [recv_capacity, hidden] bf16, f16 or f32, in the layout of the handle.
      handle: of the dispatch.
      weights: expert layout only: [recv_capacity] f32 at the rows, as `Dispatched.weights`, or
        [num_tokens, num_topk] f32 at the tokens. None: 1. In the rank layout the caller has
        summed, and weighted, its experts.
      bias: one or two arrays [num_tokens, hidden] of the rows' dtype, added to the result.
      backend: None (the group's), "cpu" or "xla". Any back end takes any handle of its group.

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
    if not isinstance(handle, DispatchHandle):
        raise ConfigError(
            f"{_OP}: handle must be the DispatchHandle of a dispatch, got {type(handle).__name__}"
        )
    group = _checks.require_group(_registry.find_group(handle.group, op=_OP), op=_OP)
    layout = Layout[handle.layout.upper()]
    rows = _checks.require_rows(rows, op=_OP, argument="rows")
    if rows.shape[0] != handle.recv_capacity:
        raise ShapeError(
            f"{_OP}: rows must be [recv_capacity={handle.recv_capacity}, hidden] as the handle "
            f"(layout={handle.layout!r}) has it, got shape {rows.shape}"
        )
    _require_whole(handle, layout, group.num_ranks)
    biases = _as_biases(bias, rows, handle.send_row.shape[0])
    _require_weights(weights, handle, layout)
    spec = CombineSpec(
        group=group.spec,
        backend=_checks.require_backend(backend, group, op=_OP),
        layout=layout,
        recv_capacity=handle.recv_capacity,
    )
    operands = (rows, weights, biases, handle.index(), handle.recv_k)
    leaves, structure = jax.tree.flatten(operands)
    leaves = list(_jax_compat.vary_alike([jnp.asarray(a) for a in leaves], group.axes))
    rows, weights, biases, index, recv_k = jax.tree.unflatten(structure, leaves)
    if weights is not None and weights.ndim == 2:
        weights = _to_rows(spec, weights, index, recv_k)
    return _combine(spec, rows, weights, biases, index)


def _as_biases(
    bias: jax.Array | Sequence[jax.Array] | None, rows: jax.Array, num_tokens: int
) -> tuple[jax.Array, ...]:
    given = () if bias is None else bias if isinstance(bias, (tuple, list)) else (bias,)
    if len(given) > _MAX_BIASES:
        raise ConfigError(f"{_OP}: bias takes at most {_MAX_BIASES} arrays, got {len(given)}")
    biases = tuple(_checks.require_array(b, op=_OP, argument="bias") for b in given)
    for b in biases:
        _checks.require_shape(b, (num_tokens, rows.shape[1]), op=_OP, argument="bias")
        _checks.require_dtype(b, (rows.dtype,), op=_OP, argument="bias")
    return biases


def _require_whole(handle: DispatchHandle, layout: Layout, num_ranks: int) -> None:
    # A handle built by hand, or half of one, is told here rather than by a wrong result.
    is_whole = (handle.send_rank is None and handle.recv_k is None) == (layout is Layout.RANK)
    columns = handle.send_row.shape[1] if handle.send_row.ndim == 2 else None
    if not is_whole or (layout is Layout.RANK and columns != num_ranks):
        raise GroupError(
            f"{_OP}: the handle's arrays do not fit its layout={handle.layout!r} and "
            f"num_ranks={num_ranks}: send_row has shape {handle.send_row.shape}"
        )
    _checks.require_shape(
        handle.recv_src, (handle.recv_capacity,), op=_OP, argument="handle.recv_src"
    )


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


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _combine(
    spec: CombineSpec,
    rows: jax.Array,
    weights: jax.Array | None,
    biases: tuple[jax.Array, ...],
    index: RowIndex,
) -> jax.Array:
    return _backends.get(spec.backend).combine(spec, index, rows, weights, biases)


def _combine_fwd(
    spec: CombineSpec,
    rows: jax.Array,
    weights: jax.Array | None,
    biases: tuple[jax.Array, ...],
    index: RowIndex,
) -> tuple[jax.Array, Any]:
    out = _backends.get(spec.backend).combine(spec, index, rows, weights, biases)
    saved_rows = None if weights is None else rows
    return out, (saved_rows, weights, len(biases), index.recv_src)


def _combine_bwd(spec: CombineSpec, residuals: Any, ct: jax.Array) -> tuple[Any, Any, Any, None]:
    rows, weights, num_biases, recv_src = residuals
    rows_bar = _backends.get(spec.backend).pull_rows(spec.group, recv_src, ct)
    bias_bars = (ct,) * num_biases
    if weights is None:
        return rows_bar, None, bias_bars, None
    wide = rows_bar.astype(jnp.float32)
    dot = jnp.sum(rows.astype(jnp.float32) * wide, axis=-1)
    # A row without a token may hold anything, NaN included.
    weights_bar = jnp.where(recv_src >= 0, dot, 0.0)
    return (wide * weights[:, None]).astype(ct.dtype), weights_bar, bias_bars, None


_combine.defvjp(_combine_fwd, _combine_bwd)


def _to_rows(
    spec: CombineSpec, weights: jax.Array, index: RowIndex, recv_k: jax.Array
) -> jax.Array:
    """Weights [T, K] at the tokens, moved to the rows: [C]. Its transpose moves them back."""
    num_topk = weights.shape[1]
    send_rank, send_row, recv_src = index.send_rank, index.send_row, index.recv_src
    assert send_rank is not None
    from_tokens = jnp.where(recv_src >= 0, recv_src * num_topk + recv_k, -1)
    from_rows = jnp.where(send_row >= 0, send_rank * spec.recv_capacity + send_row, -1)
    moved = _move(spec, weights.reshape(-1, 1), from_tokens, from_rows.reshape(-1))
    return moved[:, 0]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _move(spec: CombineSpec, x: jax.Array, index: jax.Array, inverse: jax.Array) -> jax.Array:
    return _backends.get(spec.backend).pull_rows(spec.group, index, x)


def _move_fwd(
    spec: CombineSpec, x: jax.Array, index: jax.Array, inverse: jax.Array
) -> tuple[jax.Array, jax.Array]:
    return _backends.get(spec.backend).pull_rows(spec.group, index, x), inverse


def _move_bwd(spec: CombineSpec, inverse: jax.Array, ct: jax.Array) -> tuple[jax.Array, None, None]:
    return _backends.get(spec.backend).pull_rows(spec.group, inverse, ct), None, None


_move.defvjp(_move_fwd, _move_bwd)
