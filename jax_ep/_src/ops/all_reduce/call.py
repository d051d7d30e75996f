"""The custom call of all_reduce; xla_ffi/ops/all_reduce/all_reduce_ffi.h declares its handler."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jax_ep._src.base import limits
from jax_ep._src.base.jax_compat import varying_axes
from jax_ep._src.base.options import Algorithm, Movement
from jax_ep._src.base.spec import ReduceSpec
from jax_ep._src.ops.all_reduce import stock
from jax_ep._src.ops.common.check_mesh import check_mesh
from jax_ep._src.ops.common.primitive import Result, batch_at, make_primitive


def _results(position: Any, x: Any, *, movement: Movement, num_ranks: int, **_: Any) -> Result:
    shapes = {
        Movement.ALL_REDUCE: x.shape,
        Movement.REDUCE_SCATTER: x.shape[1:],
        Movement.ALL_GATHER: (num_ranks, *x.shape),
    }
    return Result(shapes[movement], x.dtype)


def _varying(position: Any, x: Any, *, movement: Movement, axes: tuple[str, ...], **_: Any) -> Any:
    own = varying_axes(x)
    return own - set(axes) if movement is Movement.ALL_REDUCE else own


def _batch(
    operands: Sequence[Any],
    dims: Sequence[Any],
    *,
    movement: Movement,
    algorithm: Algorithm,
    num_ranks: int,
    **parameters: Any,
) -> tuple[Sequence[Any], Sequence[int]]:
    """Carries a batch in one call.

    The axis of the batch becomes an axis of the array, behind the axis of the ranks. If the batch
    is too large for low_latency, one_shot takes its place. If the batch is too large for staging,
    each element is a call.
    """
    position, x = operands
    before = int(movement is Movement.REDUCE_SCATTER)
    x = batch_at(x, dims[1], before, x.shape[dims[1]])
    num_bytes = x.size * x.dtype.itemsize // (x.shape[0] if before else 1)
    if algorithm is Algorithm.LOW_LATENCY and num_bytes > limits.slot_payload(num_ranks):
        algorithm = Algorithm.ONE_SHOT
    bind = partial(_bind, movement=movement, algorithm=algorithm, num_ranks=num_ranks, **parameters)
    after = int(movement is Movement.ALL_GATHER)
    if parameters["is_staged"] and num_bytes > limits.push_payload(num_ranks):
        each = [bind(position, jnp.take(x, i, before)) for i in range(x.shape[before])]
        return [jnp.stack(each, after)], [after]
    return [bind(position, x)], [after]


_bind = make_primitive(
    "all_reduce",
    _results,
    platforms=("cpu", "cuda"),
    attributes=("algorithm", "group", "movement"),
    varying=_varying,
    batch=_batch,
)


def all_reduce(spec: ReduceSpec, x: jax.Array) -> jax.Array:
    """Adds up or gathers an array of any shape with at least one element.

    If peers cannot read the operand, XLA's collectives carry it, with sums in the same order.

    Returns: the sum over the ranks; for a scatter of [num_ranks, ...], this rank's part of the
      sum; for a gather, [num_ranks, ...].
    """
    if spec.backend == "xla" or not spec.is_carried(x):
        return stock.all_reduce(spec, x)
    position = check_mesh(spec.group.position(), spec.group, op=spec.op)
    result: jax.Array = _bind(
        position,
        x,
        algorithm=spec.algorithm,
        axes=spec.group.axes,
        group=spec.group.identity,
        is_staged=spec.group.staging_bytes is not None,
        movement=spec.movement,
        num_ranks=spec.group.num_ranks,
        op=spec.op,
    )
    return result
