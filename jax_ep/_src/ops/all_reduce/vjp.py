"""all_reduce, reduce_scatter and all_gather with their gradients.

A scatter is the transpose of a gather. The transpose of a sum depends on check_vma.
"""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jax_ep._src.base import jax_compat
from jax_ep._src.base.operations import REDUCE_NAME
from jax_ep._src.base.options import Algorithm, Movement
from jax_ep._src.base.spec import ReduceSpec, gradient_of
from jax_ep._src.ops.all_reduce import call, stock
from jax_ep._src.ops.all_reduce.choice import SUM_DTYPES


def move(spec: ReduceSpec, x: jax.Array) -> jax.Array:
    """Runs the operation, with its gradient, on an array that varies over the group's axes."""
    if spec.algorithm is Algorithm.PSUM:
        return named(stock.jax_collective(spec, x))
    return named(_move(typed(spec, x), x))


def named(result: jax.Array) -> jax.Array:
    """Names a result, so that save_communication_policy keeps it."""
    kept: jax.Array = checkpoint_name(result, REDUCE_NAME)
    return kept


def typed(spec: ReduceSpec, x: jax.Array) -> ReduceSpec:
    """Returns `spec` with is_typed set. With check_vma on, `x` varies over the group's axes."""
    is_typed = set(spec.group.axes) <= jax_compat.varying_axes(jax.typeof(x))
    return replace(spec, is_typed=is_typed)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _move(spec: ReduceSpec, x: jax.Array) -> jax.Array:
    return call.all_reduce(spec, x)


def _move_fwd(spec: ReduceSpec, x: jax.Array) -> tuple[jax.Array, None]:
    return _move(spec, x), None


def _move_bwd(spec: ReduceSpec, _: None, ct: jax.Array) -> tuple[jax.Array]:
    if spec.movement is Movement.ALL_REDUCE:
        return (transpose_of_sum(spec, ct),)
    spec = replace(spec, op=gradient_of(spec.op))
    back = {
        Movement.REDUCE_SCATTER: Movement.ALL_GATHER,
        Movement.ALL_GATHER: Movement.REDUCE_SCATTER,
    }[spec.movement]
    spec = replace(spec, movement=back)
    if back is Movement.REDUCE_SCATTER and ct.dtype not in [jnp.dtype(d) for d in SUM_DTYPES]:
        return (stock.jax_collective(replace(spec, algorithm=Algorithm.PSUM), ct),)
    # The gradient moves as many bytes from each rank, so the same algorithm fits.
    return (_move(spec, ct),)


_move.defvjp(_move_fwd, _move_bwd)


def transpose_of_sum(spec: ReduceSpec, ct: jax.Array) -> jax.Array:
    """Returns the cotangent of a rank's term from the cotangent of the sum of all_reduce.

    With check_vma on, the cotangent is summed only over the axes that it varies over. The sum does
    not vary over the group's axes, but an array that was added to it may.
    """
    spec = replace(spec, op=gradient_of(spec.op))
    axes = spec.group.axes
    if not spec.is_typed:
        return _move(spec, ct)
    varying = jax_compat.varying_axes(jax.typeof(ct))
    left = tuple(a for a in axes if a in varying)
    if left == axes:
        ct = _move(spec, ct)
    elif left:
        ct = jax.lax.psum(ct, left)
    (cast,) = jax_compat.vary_alike([ct], axes)
    return cast
