"""The `xla` back end of all_reduce and its relatives: sums of ours out of stock collectives."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jax_ep import _exact
from jax_ep._primitives.check_mesh import check_mesh
from jax_ep._spec import ReduceSpec
from jax_ep.config import Algorithm, Movement


def all_reduce(spec: ReduceSpec, x: jax.Array) -> jax.Array:
    """The contract of the custom call: sums in the order of the ranks."""
    axes = spec.group.axes
    x = _check_mesh(spec, x)
    if spec.movement is Movement.ALL_GATHER:
        gathered: jax.Array = jax.lax.all_gather(x, axes)
        return gathered
    if spec.movement is Movement.REDUCE_SCATTER:
        return _sum(jax.lax.all_to_all(x, axes, split_axis=0, concat_axis=0))
    # Not all_gather, whose result is typed as varying: a sum of bits with zeros is exact.
    bits = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")
    places = jnp.arange(spec.group.num_ranks, dtype=jnp.int32).reshape(-1, *(1 for _ in x.shape))
    placed = jnp.where(places == jax.lax.axis_index(axes), bits, jnp.zeros((), bits.dtype))
    return _sum(jax.lax.bitcast_convert_type(jax.lax.psum(placed, axes), x.dtype))


def stock(spec: ReduceSpec, x: jax.Array) -> jax.Array:
    """What JAX has: any dtype and size, its own order of the sum, its own gradient."""
    assert spec.algorithm is Algorithm.PSUM
    collectives: dict[Movement, Callable[..., jax.Array]] = {
        Movement.ALL_REDUCE: jax.lax.psum,
        Movement.REDUCE_SCATTER: jax.lax.psum_scatter,
        Movement.ALL_GATHER: jax.lax.all_gather,
    }
    return collectives[spec.movement](_check_mesh(spec, x), spec.group.axes)


def all_reduce_residual_rmsnorm(
    spec: ReduceSpec, x: jax.Array, residual: jax.Array, scale: jax.Array, eps: float
) -> tuple[jax.Array, jax.Array]:
    """The same by one operation after the other."""
    add_up = stock if spec.algorithm is Algorithm.PSUM else all_reduce
    new_residual = add(add_up(spec, x), residual)
    return rms_norm(new_residual, scale, eps), new_residual


def add(total: jax.Array, residual: jax.Array) -> jax.Array:
    """Both rounded before, and the sum after it, whatever made them and takes it."""
    return _exact.rounded(_exact.kept(total) + _exact.kept(residual), total.dtype)


def rms_norm(h: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """Of the last axis, in f32, rounded once."""
    wide = h.astype(jnp.float32)
    mean = jnp.mean(wide * wide, axis=-1, keepdims=True)
    factor = 1.0 / jnp.sqrt(mean + jnp.float32(eps))
    wide_scale = scale.astype(jnp.float32).reshape(*(1 for _ in h.shape[1:]), -1)
    return _exact.kept((wide * factor * wide_scale).astype(h.dtype))


def _sum(terms: jax.Array) -> jax.Array:
    """Over the leading axis, one by one."""
    if not jnp.issubdtype(terms.dtype, jnp.floating):
        return functools.reduce(jnp.add, list(terms))
    # Over one rank no collective parts the terms from what made them.
    wide = _exact.kept(terms).astype(jnp.float32)
    return _exact.rounded(functools.reduce(jnp.add, list(wide)), terms.dtype)


def _check_mesh(spec: ReduceSpec, x: jax.Array) -> jax.Array:
    return check_mesh(x, spec.group, op=spec.op, has_jvp=True)
