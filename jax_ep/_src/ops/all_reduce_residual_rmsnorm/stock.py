"""all_reduce_residual_rmsnorm as three operations, one after the other."""

import jax
import jax.numpy as jnp

from jax_ep._src.base import exact
from jax_ep._src.base.options import Algorithm
from jax_ep._src.base.spec import ReduceSpec
from jax_ep._src.ops.all_reduce.stock import all_reduce, jax_collective


def all_reduce_residual_rmsnorm(
    spec: ReduceSpec, x: jax.Array, residual: jax.Array, scale: jax.Array, eps: float
) -> tuple[jax.Array, jax.Array]:
    """Runs the three operations one after the other."""
    add_up = jax_collective if spec.algorithm is Algorithm.PSUM else all_reduce
    new_residual = add(add_up(spec, x), residual)
    return rms_norm(new_residual, scale, eps), new_residual


def add(total: jax.Array, residual: jax.Array) -> jax.Array:
    """Adds rounded operands and rounds the sum, in spite of the compiler's fusions."""
    return exact.rounded(exact.kept(total) + exact.kept(residual), total.dtype)


def rms_norm(h: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """Normalises the last axis in f32, rounded once."""
    wide = h.astype(jnp.float32)
    mean = jnp.mean(wide * wide, axis=-1, keepdims=True)
    factor = 1.0 / jnp.sqrt(mean + jnp.float32(eps))
    wide_scale = scale.astype(jnp.float32).reshape(*(1 for _ in h.shape[1:]), -1)
    return exact.kept((wide * factor * wide_scale).astype(h.dtype))
