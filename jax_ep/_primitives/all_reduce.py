"""The primitive of all_reduce; xla_ffi/ops/all_reduce/all_reduce_ffi.h is its other side."""

from collections.abc import Sequence
from typing import Any

import jax

from jax_ep._jax_compat import varying_axes
from jax_ep._primitives._base import batch_at, make_primitive
from jax_ep._primitives.check_mesh import check_mesh
from jax_ep._spec import ReduceSpec
from jax_ep.config import Movement


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
    operands: Sequence[Any], dims: Sequence[Any], *, movement: int, **parameters: Any
) -> tuple[Sequence[Any], Sequence[int]]:
    """The elements of a batch are elements like others; a rank's axis stays in front of them."""
    position, x = operands
    before = int(Movement(movement) is Movement.REDUCE_SCATTER)
    x = batch_at(x, dims[1], before, x.shape[dims[1]])
    after = int(Movement(movement) is Movement.ALL_GATHER)
    return _bind(position, x, movement=movement, **parameters), [after]


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
    position = check_mesh(spec.group.position(), spec.group, op=spec.movement.name.lower())
    return _bind(
        position,
        x,
        algorithm=spec.algorithm.value,
        axes=spec.group.axes,
        group=spec.group.identity,
        movement=spec.movement.value,
        num_ranks=spec.group.num_ranks,
    )[0]
