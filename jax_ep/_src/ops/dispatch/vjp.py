"""dispatch, dispatch_fp8 and the dispatch along a handle, with their gradients.

A dispatch is the transpose of combine without weights: the gradient of the rows is a combine along
the same routes.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jax_ep._src.base import jax_compat
from jax_ep._src.base.operations import DISPATCH_NAME
from jax_ep._src.base.options import Layout
from jax_ep._src.base.spec import DispatchResults, DispatchSpec, ExchangeSpec, RouteSpec, RowIndex
from jax_ep._src.ops.common.refuse_gradient import refuse_low_latency
from jax_ep._src.ops.dispatch.fp8 import FP8_DTYPES, dequantize_fp8, quantize_fp8
from jax_ep._src.ops.two_levels import dispatch as two_levels
from jax_ep._src.ops.two_levels.combine import combine
from jax_ep._src.ops.two_levels.pull import pull_along, pull_to_tokens

Rows = tuple[jax.Array, ...]


def _is_fp8(x: jax.Array) -> bool:
    return x.dtype in [jnp.dtype(d) for d in FP8_DTYPES]


def _rows_bar(spec: ExchangeSpec, index: RowIndex, cts: Rows) -> tuple[Any, ...]:
    """Returns cotangents of the rows that a dispatch moved: combine for x, zeros for the others.

    The other cotangents are zeros, not None: None would end the chain of derivatives in silence,
    before refuse_gradient could raise.
    """
    num_tokens = index.send_row.shape[0]
    back = spec.to_route()

    def bar(i: int, ct: jax.Array) -> Any:
        if i == 0 and not _is_fp8(ct):
            return combine(back, index, ct, None, ())
        if not jnp.issubdtype(ct.dtype, jnp.floating):
            return None
        zeros = jnp.zeros((num_tokens, *ct.shape[1:]), ct.dtype)
        return jax_compat.vary_alike((zeros, ct), ())[0]

    return tuple(bar(i, ct) for i, ct in enumerate(cts))


def send_rank(spec: DispatchSpec, topk_idx: jax.Array, send_row: jax.Array) -> jax.Array | None:
    """Returns the destination of each choice that was sent (-1 = none) in the expert layout.

    The rank layout needs no such array: None.
    """
    if spec.layout is Layout.RANK:
        return None
    return jnp.where(send_row >= 0, topk_idx // spec.num_local_experts, -1)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def dispatch(
    spec: DispatchSpec,
    rows: Rows,
    topk_weights: jax.Array | None,
    topk_idx: jax.Array,
    rank_mask: jax.Array | None,
) -> DispatchResults:
    """Routes tokens and moves their rows; only the first of `rows` is differentiable."""
    routed = two_levels.dispatch(spec, topk_idx, topk_weights, rows, rank_mask)
    named: DispatchResults = jax.tree.map(lambda a: checkpoint_name(a, DISPATCH_NAME), routed)
    return named


def _dispatch_fwd(
    spec: DispatchSpec,
    rows: Rows,
    topk_weights: jax.Array | None,
    topk_idx: jax.Array,
    rank_mask: jax.Array | None,
) -> tuple[DispatchResults, Any]:
    routed = dispatch.fun(spec, rows, topk_weights, topk_idx, rank_mask)
    return routed, _residuals(topk_idx, routed)


def _residuals(topk_idx: jax.Array, routed: DispatchResults) -> tuple[jax.Array | None, ...]:
    return topk_idx, routed.send_row, routed.recv_src, routed.recv_k


def _dispatch_bwd(
    spec: DispatchSpec, residuals: Any, ct: DispatchResults
) -> tuple[Any, Any, None, None]:
    refuse_low_latency(spec)
    topk_idx, send_row, recv_src, recv_k = residuals
    spec = spec.of_gradient()
    index = RowIndex(send_rank(spec, topk_idx, send_row), send_row, recv_src, recv_k)
    rows_bar = _rows_bar(spec, index, ct.rows)
    return rows_bar, _weights_bar(spec, residuals, ct.recv_weights), None, None


def _weights_bar(spec: DispatchSpec, residuals: Any, ct: jax.Array | None) -> jax.Array | None:
    if ct is None:
        return None
    topk_idx, send_row, *_ = residuals
    place = _place_of_choice(spec, topk_idx, send_row).reshape(-1)
    moved = pull_to_tokens(spec, place, ct.reshape(-1, 1))
    return moved.reshape(topk_idx.shape)


def _place_of_choice(spec: DispatchSpec, topk_idx: jax.Array, send_row: jax.Array) -> jax.Array:
    """Returns [T, K], the place of each choice's weight in all ranks' weight arrays; -1 = none."""
    is_expert = (topk_idx >= 0) & (topk_idx < spec.num_experts)
    rank = jnp.where(is_expert, topk_idx // spec.num_local_experts, 0)
    if spec.layout is Layout.EXPERT:
        return jnp.where(send_row >= 0, rank * spec.recv_capacity + send_row, -1)
    row = jnp.take_along_axis(send_row, rank, axis=1)
    num_topk = topk_idx.shape[1]
    choice = jnp.arange(num_topk, dtype=jnp.int32)[None, :]
    place = (rank * spec.recv_capacity + row) * num_topk + choice
    return jnp.where(is_expert & (row >= 0), place, -1)


dispatch.defvjp(_dispatch_fwd, _dispatch_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def dispatch_fp8(
    spec: DispatchSpec,
    options: tuple[int, str],
    x: jax.Array,
    topk_weights: jax.Array | None,
    topk_idx: jax.Array,
) -> DispatchResults:
    """Dispatches x alone, as fp8; options are block and scales of quantize_fp8."""
    block, scales = options
    rounded = quantize_fp8(x, block=block, scales=scales)
    routed = dispatch(spec, rounded, topk_weights, topk_idx, None)
    rows, row_scales = routed.rows
    received = dequantize_fp8(rows, row_scales, x.dtype)
    return routed._replace(rows=(received,))


def _dispatch_fp8_fwd(
    spec: DispatchSpec,
    options: tuple[int, str],
    x: jax.Array,
    topk_weights: jax.Array | None,
    topk_idx: jax.Array,
) -> tuple[DispatchResults, Any]:
    routed = dispatch_fp8.fun(spec, options, x, topk_weights, topk_idx)
    return routed, _residuals(topk_idx, routed)


def _dispatch_fp8_bwd(
    spec: DispatchSpec, options: tuple[int, str], residuals: Any, ct: DispatchResults
) -> tuple[Any, Any, None]:
    (x_bar,), weights_bar, *_ = _dispatch_bwd(spec, residuals, ct)
    return x_bar, weights_bar, None


dispatch_fp8.defvjp(_dispatch_fp8_fwd, _dispatch_fp8_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def dispatch_along(spec: RouteSpec, rows: Rows, index: RowIndex) -> Rows:
    """Moves other rows to the places where a dispatch has put the tokens; zeros elsewhere."""
    moved = tuple(pull_along(spec, index, r) for r in rows)
    return tuple(checkpoint_name(m, DISPATCH_NAME) for m in moved)


def _dispatch_along_fwd(spec: RouteSpec, rows: Rows, index: RowIndex) -> tuple[Rows, RowIndex]:
    return dispatch_along.fun(spec, rows, index), index


def _dispatch_along_bwd(spec: RouteSpec, index: RowIndex, cts: Rows) -> tuple[Any, None]:
    return _rows_bar(spec.of_gradient(), index, cts), None


dispatch_along.defvjp(_dispatch_along_fwd, _dispatch_along_bwd)
