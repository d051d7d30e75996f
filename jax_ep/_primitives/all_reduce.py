"""The primitive of all_reduce; xla_ffi/ops/all_reduce/all_reduce_ffi.h is its other side."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jax_ep import _limits
from jax_ep._jax_compat import varying_axes
from jax_ep._primitives._base import batch_at, make_primitive
from jax_ep._primitives.check_mesh import check_mesh
from jax_ep._spec import ReduceSpec
from jax_ep.config import Algorithm, Movement


def _results(
    position: Any, x: Any, *, movement: int, num_ranks: int, **_: Any
) -> list[tuple[tuple[int, ...], Any]]:
    shapes = {
        Movement.ALL_REDUCE: x.shape,
        Movement.REDUCE_SCATTER: x.shape[1:],
        Movement.ALL_GATHER: (num_ranks, *x.shape),
    }
    return [(shapes[Movement(movement)], x.dtype)]


def _varying(position: Any, x: Any, *, movement: int, axes: tuple[str, ...], **_: Any) -> Any:
    own = varying_axes(x)
    return own - set(axes) if Movement(movement) is Movement.ALL_REDUCE else own


def _batch(
    operands: Sequence[Any],
    dims: Sequence[Any],
    *,
    movement: int,
    algorithm: int,
    num_ranks: int,
    **parameters: Any,
) -> tuple[Sequence[Any], Sequence[int]]:
    """The elements of a batch are elements like others; a rank's axis stays in front of them.

    But a batch may be too large for what was chosen for one of it.
    """
    position, x = operands
    kind = Movement(movement)
    before = int(kind is Movement.REDUCE_SCATTER)
    x = batch_at(x, dims[1], before, x.shape[dims[1]])
    num_bytes = x.size * x.dtype.itemsize // (x.shape[0] if before else 1)
    if algorithm == Algorithm.LOW_LATENCY.value and num_bytes > _limits.packet_payload(num_ranks):
        algorithm = Algorithm.ONE_SHOT.value
    bind = partial(_bind, movement=movement, algorithm=algorithm, num_ranks=num_ranks, **parameters)
    after = int(kind is Movement.ALL_GATHER)
    if parameters["is_staged"] and num_bytes > _limits.push_payload(num_ranks):
        each = [bind(position, jnp.take(x, i, before))[0] for i in range(x.shape[before])]
        return [jnp.stack(each, after)], [after]
    return bind(position, x), [after]


_bind = make_primitive(
    "all_reduce",
    _results,
    platforms=("cpu", "cuda"),
    attributes=("algorithm", "group", "movement"),
    varying=_varying,
    batch=_batch,
)


def all_reduce(spec: ReduceSpec, x: jax.Array) -> jax.Array:
    """The custom call on an array of any shape, at least one element.

    Returns the sum over the ranks; or, of a scatter of [num_ranks, ...], this rank's part of it;
    or, of a gather, [num_ranks, ...].
    """
    position = check_mesh(spec.group.position(), spec.group, op=spec.op)
    return _bind(
        position,
        x,
        algorithm=spec.algorithm.value,
        axes=spec.group.axes,
        group=spec.group.identity,
        is_staged=spec.group.staging_bytes is not None,
        movement=spec.movement.value,
        num_ranks=spec.group.num_ranks,
        op=spec.op,
    )[0]
