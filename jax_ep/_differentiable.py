"""The communicating operations with their gradients: what the public functions bind.

Every gradient is one of the operations again, on the same back end: dispatch and combine are each
other's transpose, and pulling single rows is its own with the inverse index. Results carry the
checkpoint names, so that a remat policy can save them.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jax_ep import _backends, config
from jax_ep._spec import CombineSpec, DispatchSpec, Routed, RowIndex
from jax_ep.config import Layout
from jax_ep.errors import ConfigError
from jax_ep.fp8 import FP8_DTYPES, dequantize_fp8, quantize_fp8

Rows = tuple[jax.Array, ...]


def _is_zero(cotangent: Any) -> bool:
    return cotangent is None or isinstance(cotangent, jax.custom_derivatives.SymbolicZero)


def _values(primals: Any) -> Any:
    """The arrays of a forward rule's operands."""
    return jax.tree.map(lambda p: p.value, primals, is_leaf=lambda p: hasattr(p, "perturbed"))


def _refuse_perturbed(rows: Any, *, op: str) -> None:
    """Only the tokens themselves, and not as fp8, can be differentiated."""
    for i, row in enumerate(rows):
        if not row.perturbed:
            continue
        if jnp.dtype(row.value.dtype) in [jnp.dtype(d) for d in FP8_DTYPES]:
            raise ConfigError(
                f"{op}: fp8 rows cannot be differentiated, their cotangent would be rounded to "
                f"fp8; use jax_ep.dispatch_fp8, or jax.lax.stop_gradient; got {row.value.dtype}"
            )
        if i > 0:
            raise ConfigError(
                f"{op}: scales and payload cannot be differentiated; use jax.lax.stop_gradient"
            )


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


def _dispatch_fwd(spec: DispatchSpec, rows: Any, weights: Any, topk_idx: Any) -> tuple[Routed, Any]:
    _refuse_perturbed(rows, op="dispatch")
    topk_idx = topk_idx.value
    routed = dispatch.fun(spec, _values(rows), _values(weights), topk_idx)
    return routed, (topk_idx, routed.send_row, routed.recv_src)


def _dispatch_bwd(spec: DispatchSpec, residuals: Any, ct: Routed) -> tuple[Any, Any, None]:
    rows_bar = (_rows_bar(spec, residuals, ct.rows[0]), *(None for _ in ct.rows[1:]))
    return rows_bar, _weights_bar(spec, residuals, ct.recv_weights), None


def _rows_bar(spec: DispatchSpec, residuals: Any, ct: Any) -> jax.Array | None:
    topk_idx, send_row, recv_src = residuals
    if _is_zero(ct) or ct.dtype in [jnp.dtype(d) for d in FP8_DTYPES]:
        return None
    index = RowIndex(send_rank(spec, topk_idx, send_row), send_row, recv_src)
    back = CombineSpec(spec.group, spec.backend, spec.layout, spec.recv_capacity)
    return _backends.get(spec.backend).combine(back, index, ct, None, ())


def _weights_bar(spec: DispatchSpec, residuals: Any, ct: Any) -> jax.Array | None:
    topk_idx, send_row, _ = residuals
    if _is_zero(ct):
        return None
    place = _place_of_choice(spec, topk_idx, send_row).reshape(-1)
    moved = _backends.get(spec.backend).pull_rows(spec.group, place, ct.reshape(-1, 1))
    return moved.reshape(topk_idx.shape)


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


dispatch.defvjp(_dispatch_fwd, _dispatch_bwd, symbolic_zeros=True)


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
    spec: DispatchSpec, options: tuple[int, str], x: Any, weights: Any, topk_idx: Any
) -> tuple[Routed, Any]:
    topk_idx = topk_idx.value
    routed = dispatch_fp8.fun(spec, options, x.value, _values(weights), topk_idx)
    return routed, (topk_idx, routed.send_row, routed.recv_src)


def _dispatch_fp8_bwd(
    spec: DispatchSpec, options: tuple[int, str], residuals: Any, ct: Routed
) -> tuple[Any, Any, None]:
    x_bar = _rows_bar(spec, residuals, ct.rows[0])
    return x_bar, _weights_bar(spec, residuals, ct.recv_weights), None


dispatch_fp8.defvjp(_dispatch_fp8_fwd, _dispatch_fp8_bwd, symbolic_zeros=True)


# --- dispatch along a known routing


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def dispatch_along(spec: CombineSpec, rows: Rows, index: RowIndex) -> Rows:
    """Moves other rows to where a dispatch has put the tokens; zeros elsewhere."""
    pull = _backends.get(spec.backend).pull_rows
    moved = tuple(pull(spec.group, index.recv_src, r) for r in rows)
    return tuple(checkpoint_name(m, config.DISPATCH_NAME) for m in moved)


def _dispatch_along_fwd(spec: CombineSpec, rows: Any, index: Any) -> tuple[Rows, RowIndex]:
    _refuse_perturbed(rows, op="dispatch")
    index = _values(index)
    return dispatch_along.fun(spec, _values(rows), index), index


def _dispatch_along_bwd(spec: CombineSpec, index: RowIndex, ct: Any) -> tuple[Any, None]:
    if _is_zero(ct[0]) or ct[0].dtype in [jnp.dtype(d) for d in FP8_DTYPES]:
        return (None,) * len(ct), None
    x_bar = _backends.get(spec.backend).combine(spec, index, ct[0], None, ())
    return (x_bar, *(None for _ in ct[1:])), None


dispatch_along.defvjp(_dispatch_along_fwd, _dispatch_along_bwd, symbolic_zeros=True)


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


combine.defvjp(_combine_fwd, _combine_bwd)


# --- single rows


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def pull_rows(
    spec: CombineSpec, rows: jax.Array, index: jax.Array, inverse: jax.Array
) -> jax.Array:
    """Rows of the peers' arrays by index; `inverse` names, for each row, who pulls it."""
    return _backends.get(spec.backend).pull_rows(spec.group, index, rows)


def _pull_rows_fwd(
    spec: CombineSpec, rows: jax.Array, index: jax.Array, inverse: jax.Array
) -> tuple[jax.Array, jax.Array]:
    return pull_rows.fun(spec, rows, index, inverse), inverse


def _pull_rows_bwd(
    spec: CombineSpec, inverse: jax.Array, ct: jax.Array
) -> tuple[jax.Array, None, None]:
    return _backends.get(spec.backend).pull_rows(spec.group, inverse, ct), None, None


pull_rows.defvjp(_pull_rows_fwd, _pull_rows_bwd)
