"""combine with its gradient. The gradient of the rows dispatches the cotangent along the handle."""

from functools import partial
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jax_ep._src.base.operations import COMBINE_NAME
from jax_ep._src.base.spec import RouteSpec, RowIndex
from jax_ep._src.ops.combine.call import combine_living as call_living
from jax_ep._src.ops.common.refuse_gradient import refuse_low_latency
from jax_ep._src.ops.two_levels import combine as two_levels
from jax_ep._src.ops.two_levels.pull import pull_along


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def combine(
    spec: RouteSpec,
    rows: jax.Array,
    weights: jax.Array | None,
    biases: tuple[jax.Array, ...],
    index: RowIndex,
) -> jax.Array:
    """Brings rows back to their tokens and adds them."""
    out = two_levels.combine(spec, index, rows, weights, biases)
    named: jax.Array = checkpoint_name(out, COMBINE_NAME)
    return named


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def combine_living(
    spec: RouteSpec,
    rows: jax.Array,
    weights: jax.Array | None,
    biases: tuple[jax.Array, ...],
    index: RowIndex,
) -> tuple[jax.Array, jax.Array | None]:
    """Combines along a handle that leaves ranks out; returns the mask after the call, too."""
    return call_living(spec, index, rows, weights, biases)


def _living_fwd(
    spec: RouteSpec,
    rows: jax.Array,
    weights: jax.Array | None,
    biases: tuple[jax.Array, ...],
    index: RowIndex,
) -> tuple[tuple[jax.Array, jax.Array | None], None]:
    return combine_living.fun(spec, rows, weights, biases, index), None


def _living_bwd(spec: RouteSpec, residuals: None, ct: Any) -> NoReturn:
    refuse_low_latency(spec)
    raise AssertionError("only low-latency operations leave ranks out")


combine_living.defvjp(_living_fwd, _living_bwd)


def _fwd(
    spec: RouteSpec,
    rows: jax.Array,
    weights: jax.Array | None,
    biases: tuple[jax.Array, ...],
    index: RowIndex,
) -> tuple[jax.Array, Any]:
    out = combine.fun(spec, rows, weights, biases, index)
    saved_rows = None if weights is None else rows
    return out, (saved_rows, weights, len(biases), index)


def _bwd(spec: RouteSpec, residuals: Any, ct: jax.Array) -> tuple[Any, Any, Any, None]:
    refuse_low_latency(spec)
    rows, weights, num_biases, index = residuals
    rows_bar = pull_along(spec.of_gradient(), index, ct)
    bias_bars = (ct,) * num_biases
    if weights is None:
        return rows_bar, None, bias_bars, None
    wide = rows_bar.astype(jnp.float32)
    dot = jnp.sum(rows.astype(jnp.float32) * wide, axis=-1)
    # A row without a token, and its weight, may hold anything, NaN included.
    has_token = index.recv_src >= 0
    weighted = jnp.where(has_token[:, None], wide * weights[:, None], 0.0)
    return weighted.astype(ct.dtype), jnp.where(has_token, dot, 0.0), bias_bars, None


combine.defvjp(_fwd, _bwd)
