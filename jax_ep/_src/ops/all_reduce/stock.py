"""The all_reduce family from XLA's collectives, with sums in jax_ep's order or in XLA's."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jax_ep._src.base import exact
from jax_ep._src.base.options import Algorithm, Movement
from jax_ep._src.base.spec import ReduceSpec
from jax_ep._src.ops.common.check_mesh import check_mesh


def all_reduce(spec: ReduceSpec, x: jax.Array) -> jax.Array:
    """Computes the results of the custom call, with sums in the order of the ranks."""
    axes = spec.group.axes
    x = _check_mesh(spec, x)
    if spec.movement is Movement.ALL_GATHER:
        gathered: jax.Array = jax.lax.all_gather(x, axes)
        return gathered
    if spec.movement is Movement.REDUCE_SCATTER:
        return _sum(jax.lax.all_to_all(x, axes, split_axis=0, concat_axis=0))
    # The result of all_gather is typed as varying, so psum gathers: bits plus zeros are exact.
    bits = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")
    places = jnp.arange(spec.group.num_ranks, dtype=jnp.int32).reshape(-1, *(1 for _ in x.shape))
    placed = jnp.where(places == jax.lax.axis_index(axes), bits, jnp.zeros((), bits.dtype))
    return _sum(jax.lax.bitcast_convert_type(jax.lax.psum(placed, axes), x.dtype))


def jax_collective(spec: ReduceSpec, x: jax.Array) -> jax.Array:
    """Runs JAX's collective: any dtype and size, XLA's order of the sum, JAX's gradient."""
    assert spec.algorithm is Algorithm.PSUM
    collectives: dict[Movement, Callable[..., jax.Array]] = {
        Movement.ALL_REDUCE: jax.lax.psum,
        Movement.REDUCE_SCATTER: jax.lax.psum_scatter,
        Movement.ALL_GATHER: jax.lax.all_gather,
    }
    return collectives[spec.movement](_check_mesh(spec, x), spec.group.axes)


def _sum(terms: jax.Array) -> jax.Array:
    """Adds up the leading axis, one term after the other."""
    if not jnp.issubdtype(terms.dtype, jnp.floating):
        return functools.reduce(jnp.add, list(terms))
    # With one rank no collective separates the terms from the computation that made them.
    wide = exact.kept(terms).astype(jnp.float32)
    return exact.rounded(functools.reduce(jnp.add, list(wide)), terms.dtype)


def _check_mesh(spec: ReduceSpec, x: jax.Array) -> jax.Array:
    return check_mesh(x, spec.group, op=spec.op, has_jvp=True)
