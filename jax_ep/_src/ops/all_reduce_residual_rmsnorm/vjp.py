"""all_reduce_residual_rmsnorm with the gradient of the three operations one by one."""

from functools import partial
from typing import Any

import jax

from jax_ep._src.base.spec import ReduceSpec
from jax_ep._src.ops.all_reduce.vjp import named, transpose_of_sum
from jax_ep._src.ops.all_reduce_residual_rmsnorm import call
from jax_ep._src.ops.all_reduce_residual_rmsnorm.stock import rms_norm


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def all_reduce_residual_rmsnorm(
    spec: ReduceSpec, eps: float, x: jax.Array, residual: jax.Array, scale: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns (normed, new_residual), [rows, hidden] like x and residual."""
    normed, new_residual = call.all_reduce_residual_rmsnorm(spec, x, residual, scale, eps)
    return named(normed), named(new_residual)


def _fwd(spec: ReduceSpec, eps: float, *operands: jax.Array) -> Any:
    normed, new_residual = all_reduce_residual_rmsnorm.fun(spec, eps, *operands)
    return (normed, new_residual), (new_residual, operands[2])


def _bwd(spec: ReduceSpec, eps: float, kept: Any, cts: Any) -> Any:
    new_residual, scale = kept
    ct_normed, ct_residual = cts
    _, back = jax.vjp(partial(rms_norm, eps=eps), new_residual, scale)
    ct_sum, ct_scale = back(ct_normed)
    ct_sum = ct_sum + ct_residual
    return transpose_of_sum(spec, ct_sum), ct_sum, ct_scale


all_reduce_residual_rmsnorm.defvjp(_fwd, _bwd)
