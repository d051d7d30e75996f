"""The communicating operations with their gradients: what the public functions bind.

Every gradient is one of the operations again, by that one's route: dispatch and combine are each
other's transpose, and pulling single rows is its own with the inverse index. Results carry the
checkpoint names, so that a remat policy can save them.
"""

from functools import partial
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jax_ep import _backends, _jax_compat, config
from jax_ep._spec import CombineSpec, DispatchSpec, ExchangeSpec, Routed, RowIndex
from jax_ep.config import Layout
from jax_ep.errors import ConfigError
from jax_ep.fp8 import FP8_DTYPES, dequantize_fp8, quantize_fp8

Rows = tuple[jax.Array, ...]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def refuse_gradient(message: str, x: jax.Array) -> jax.Array:
    """`x`; raises ConfigError where a gradient would flow back through it."""
    return x


def _refuse_gradient_fwd(message: str, x: jax.Array) -> tuple[jax.Array, None]:
    return x, None


def _refuse_gradient_bwd(message: str, residuals: None, ct: jax.Array) -> NoReturn:
    raise ConfigError(message)


refuse_gradient.defvjp(_refuse_gradient_fwd, _refuse_gradient_bwd)


def _is_fp8(x: jax.Array) -> bool:
    return x.dtype in [jnp.dtype(d) for d in FP8_DTYPES]


def _rows_bar(spec: ExchangeSpec, index: RowIndex, cts: Rows) -> tuple[Any, ...]:
    """Cotangents of the rows that a dispatch moved: combine for x, zeros for what goes along.

    Not None: a missing cotangent would end the chain in silence, before refuse_gradient sees it.
    """
    num_tokens = index.send_row.shape[0]
    back = spec.to_combine()

    def bar(i: int, ct: jax.Array) -> Any:
        if i == 0 and not _is_fp8(ct):
            return _backends.get(back.backend).combine(back, index, ct, None, ())
        if not jnp.issubdtype(ct.dtype, jnp.floating):
            return None
        zeros = jnp.zeros((num_tokens, *ct.shape[1:]), ct.dtype)
        return _jax_compat.vary_alike((zeros, ct), ())[0]

    return tuple(bar(i, ct) for i, ct in enumerate(cts))


def _pull(spec: ExchangeSpec, index: jax.Array, rows: jax.Array, **slots: Any) -> jax.Array:
    pull = spec.to_pull()
    return _backends.get(pull.backend).pull_rows(pull, index, rows, **slots)


def send_rank(spec: DispatchSpec, topk_idx: jax.Array, send_row: jax.Array) -> jax.Array | None:
    """Expert layout: the destination of each choice that was sent, -1 = none; else None."""
    if spec.layout is Layout.RANK:
        return None
    return jnp.where(send_row >= 0, topk_idx // spec.num_local_experts, -1)


# --- dispatch: new routing


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def dispatch(
    spec: DispatchSpec, rows: Rows, topk_weights: jax.Array | None, topk_idx: jax.Array
) -> Routed:
    """Routes tokens and moves their rows; the first of `rows` is the differentiable one."""
    routed = _backends.get(spec.backend).dispatch(spec, topk_idx, topk_weights, rows)
    named: Routed = jax.tree.map(lambda a: checkpoint_name(a, config.DISPATCH_NAME), routed)
    return named


def _dispatch_fwd(
    spec: DispatchSpec, rows: Rows, topk_weights: jax.Array | None, topk_idx: jax.Array
) -> tuple[Routed, Any]:
    routed = dispatch.fun(spec, rows, topk_weights, topk_idx)
    return routed, (topk_idx, routed.send_row, routed.recv_src)


def _dispatch_bwd(spec: DispatchSpec, residuals: Any, ct: Routed) -> tuple[Any, Any, None]:
    topk_idx, send_row, recv_src = residuals
    spec = spec.of_gradient()
    index = RowIndex(send_rank(spec, topk_idx, send_row), send_row, recv_src, None)
    return _rows_bar(spec, index, ct.rows), _weights_bar(spec, residuals, ct.recv_weights), None


def _weights_bar(spec: DispatchSpec, residuals: Any, ct: jax.Array | None) -> jax.Array | None:
    if ct is None:
        return None
    topk_idx, send_row, _ = residuals
    place = _place_of_choice(spec, topk_idx, send_row).reshape(-1)
    moved = _pull(spec, place, ct.reshape(-1, 1))
    return moved.reshape(topk_idx.shape)


def _place_of_choice(spec: DispatchSpec, topk_idx: jax.Array, send_row: jax.Array) -> jax.Array:
    """[T, K]: where the weight of a choice went, counted over all ranks' weight arrays; or -1."""
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


# --- dispatch of rows that are rounded to fp8 on the way


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def dispatch_fp8(
    spec: DispatchSpec,
    options: tuple[int, str],
    x: jax.Array,
    topk_weights: jax.Array | None,
    topk_idx: jax.Array,
) -> Routed:
    """As dispatch, of x alone; options are block and scales of quantize_fp8."""
    block, scales = options
    routed = dispatch(spec, quantize_fp8(x, block=block, scales=scales), topk_weights, topk_idx)
    rows, row_scales = routed.rows
    received = dequantize_fp8(rows, row_scales, x.dtype)
    return routed._replace(rows=(received,))


def _dispatch_fp8_fwd(
    spec: DispatchSpec,
    options: tuple[int, str],
    x: jax.Array,
    topk_weights: jax.Array | None,
    topk_idx: jax.Array,
) -> tuple[Routed, Any]:
    routed = dispatch_fp8.fun(spec, options, x, topk_weights, topk_idx)
    return routed, (topk_idx, routed.send_row, routed.recv_src)


def _dispatch_fp8_bwd(
    spec: DispatchSpec, options: tuple[int, str], residuals: Any, ct: Routed
) -> tuple[Any, Any, None]:
    (x_bar,), weights_bar, _ = _dispatch_bwd(spec, residuals, ct)
    return x_bar, weights_bar, None


dispatch_fp8.defvjp(_dispatch_fp8_fwd, _dispatch_fp8_bwd)


# --- dispatch along a known routing


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def dispatch_along(spec: CombineSpec, rows: Rows, index: RowIndex) -> Rows:
    """Moves other rows to where a dispatch has put the tokens; zeros elsewhere."""
    moved = tuple(_pull_along(spec, index, r) for r in rows)
    return tuple(checkpoint_name(m, config.DISPATCH_NAME) for m in moved)


def _pull_along(spec: CombineSpec, index: RowIndex, rows: jax.Array) -> jax.Array:
    """Each token's row to its rows at the destinations."""
    num_topk = index.send_row.shape[1]
    return _pull(spec, index.recv_src, rows, slot=index.recv_k, num_slots=num_topk)


def _dispatch_along_fwd(spec: CombineSpec, rows: Rows, index: RowIndex) -> tuple[Rows, RowIndex]:
    return dispatch_along.fun(spec, rows, index), index


def _dispatch_along_bwd(spec: CombineSpec, index: RowIndex, cts: Rows) -> tuple[Any, None]:
    return _rows_bar(spec.of_gradient(), index, cts), None


dispatch_along.defvjp(_dispatch_along_fwd, _dispatch_along_bwd)


# --- combine


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def combine(
    spec: CombineSpec, rows: jax.Array, weights: jax.Array | None, biases: Rows, index: RowIndex
) -> jax.Array:
    """Brings rows back to their tokens and adds them."""
    out = _backends.get(spec.backend).combine(spec, index, rows, weights, biases)
    named: jax.Array = checkpoint_name(out, config.COMBINE_NAME)
    return named


def _combine_fwd(
    spec: CombineSpec, rows: jax.Array, weights: jax.Array | None, biases: Rows, index: RowIndex
) -> tuple[jax.Array, Any]:
    out = combine.fun(spec, rows, weights, biases, index)
    saved_rows = None if weights is None else rows
    return out, (saved_rows, weights, len(biases), index)


def _combine_bwd(spec: CombineSpec, residuals: Any, ct: jax.Array) -> tuple[Any, Any, Any, None]:
    rows, weights, num_biases, index = residuals
    rows_bar = _pull_along(spec.of_gradient(), index, ct)
    bias_bars = (ct,) * num_biases
    if weights is None:
        return rows_bar, None, bias_bars, None
    wide = rows_bar.astype(jnp.float32)
    dot = jnp.sum(rows.astype(jnp.float32) * wide, axis=-1)
    # A row without a token may hold anything, NaN included, and so may its weight.
    has_token = index.recv_src >= 0
    weighted = jnp.where(has_token[:, None], wide * weights[:, None], 0.0)
    return weighted.astype(ct.dtype), jnp.where(has_token, dot, 0.0), bias_bars, None


combine.defvjp(_combine_fwd, _combine_bwd)


# --- single rows


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def pull_rows(
    spec: CombineSpec, rows: jax.Array, index: jax.Array, inverse: jax.Array
) -> jax.Array:
    """Rows of the peers' arrays by index; `inverse` names, for each row, who pulls it."""
    return _pull(spec, index, rows)


def _pull_rows_fwd(
    spec: CombineSpec, rows: jax.Array, index: jax.Array, inverse: jax.Array
) -> tuple[jax.Array, jax.Array]:
    return pull_rows.fun(spec, rows, index, inverse), inverse


def _pull_rows_bwd(
    spec: CombineSpec, inverse: jax.Array, ct: jax.Array
) -> tuple[jax.Array, None, None]:
    return _pull(spec.of_gradient(), inverse, ct), None, None


pull_rows.defvjp(_pull_rows_fwd, _pull_rows_bwd)
