"""combine: brings the rows of a dispatch back to their tokens and adds them."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jax_ep import _backends, _checks, _jax_compat, _registry
from jax_ep._spec import GroupSpec, RowIndex
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
    num_tokens = handle.send_row.shape[0]
    biases = () if bias is None else bias if isinstance(bias, (tuple, list)) else (bias,)
    if len(biases) > _MAX_BIASES:
        raise ConfigError(f"{_OP}: bias takes at most {_MAX_BIASES} arrays, got {len(biases)}")
    for b in biases:
        _checks.require_array(b, op=_OP, argument="bias")
        _checks.require_shape(b, (num_tokens, rows.shape[1]), op=_OP, argument="bias")
        _checks.require_dtype(b, (rows.dtype,), op=_OP, argument="bias")
    _require_weights(weights, handle, layout)
    backend = _checks.require_backend(backend, group, op=_OP)
    index = handle.index()
    tree = (rows, weights, tuple(biases), index, handle.recv_k)
    leaves, structure = jax.tree.flatten(tree)
    leaves = _jax_compat.vary_alike([jnp.asarray(a) for a in leaves], group.axes)
    rows, weights, biases, index, recv_k = jax.tree.unflatten(structure, leaves)
    if weights is not None and weights.ndim == 2:
        weights = _to_rows(group.spec, backend, weights, index, recv_k, handle.recv_capacity)
    return _combine((group.spec, backend, layout), rows, weights, biases, index)


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


_Static = tuple[GroupSpec, str, Layout]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _combine(
    static: _Static,
    rows: jax.Array,
    weights: jax.Array | None,
    biases: tuple[jax.Array, ...],
    index: RowIndex,
) -> jax.Array:
    group, backend, layout = static
    return _backends.get(backend).combine(group, layout, index, weights, rows, biases)


def _combine_fwd(
    static: _Static,
    rows: jax.Array,
    weights: jax.Array | None,
    biases: tuple[jax.Array, ...],
    index: RowIndex,
) -> tuple[jax.Array, Any]:
    out = _combine(static, rows, weights, biases, index)
    saved_rows = None if weights is None else rows
    return out, (saved_rows, weights, len(biases), index.recv_src)


def _combine_bwd(static: _Static, residuals: Any, ct: jax.Array) -> tuple[Any, Any, Any, None]:
    group, backend, _ = static
    rows, weights, num_biases, recv_src = residuals
    rows_bar = _backends.get(backend).pull_rows(group, recv_src, ct)
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
    group: GroupSpec,
    backend: str,
    weights: jax.Array,
    index: RowIndex,
    recv_k: jax.Array,
    recv_capacity: int,
) -> jax.Array:
    """Weights [T, K] at the tokens, moved to the rows: [C]. Its transpose moves them back."""
    num_topk = weights.shape[1]
    at_tokens = jnp.where(index.recv_src >= 0, index.recv_src * num_topk + recv_k, -1)
    send_rank = index.send_rank
    assert send_rank is not None
    at_rows = jnp.where(index.send_row >= 0, send_rank * recv_capacity + index.send_row, -1)
    moved = _move((group, backend), weights.reshape(-1, 1), at_tokens, at_rows.reshape(-1))
    return moved[:, 0]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _move(
    static: tuple[GroupSpec, str], x: jax.Array, index: jax.Array, inverse: jax.Array
) -> jax.Array:
    group, backend = static
    return _backends.get(backend).pull_rows(group, index, x)


def _move_fwd(
    static: tuple[GroupSpec, str], x: jax.Array, index: jax.Array, inverse: jax.Array
) -> tuple[jax.Array, jax.Array]:
    return _move(static, x, index, inverse), inverse


def _move_bwd(
    static: tuple[GroupSpec, str], inverse: jax.Array, ct: jax.Array
) -> tuple[jax.Array, None, None]:
    group, backend = static
    return _backends.get(backend).pull_rows(group, inverse, ct), None, None


_move.defvjp(_move_fwd, _move_bwd)
