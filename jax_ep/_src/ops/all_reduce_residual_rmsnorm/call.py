"""The custom call of all_reduce_residual_rmsnorm.

xla_ffi/ops/all_reduce_residual_rmsnorm/all_reduce_residual_rmsnorm_ffi.h declares its handler.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jax_ep._src.base import limits
from jax_ep._src.base.jax_compat import varying_axes
from jax_ep._src.base.options import Algorithm
from jax_ep._src.base.spec import ReduceSpec
from jax_ep._src.ops.all_reduce_residual_rmsnorm import stock
from jax_ep._src.ops.common.check_mesh import check_mesh
from jax_ep._src.ops.common.primitive import Result, batch_at, batch_size, make_primitive


def _results(position: Any, x: Any, residual: Any, scale: Any, **_: Any) -> tuple[Result, Result]:
    like_x = Result(x.shape, x.dtype)
    return like_x, like_x


def _varying(
    position: Any, x: Any, residual: Any, scale: Any, *, axes: tuple[str, ...], **_: Any
) -> Any:
    return (varying_axes(x) - set(axes)) | varying_axes(residual) | varying_axes(scale)


def _batch(
    operands: Sequence[Any], dims: Sequence[Any], **parameters: Any
) -> tuple[Sequence[Any], Sequence[int]]:
    """Carries a batch in one call, as more rows.

    Each element is a call of its own if the elements have scales of their own, or if the batch is
    too large for the algorithm that was chosen for one element.
    """
    position, x, residual, scale = operands
    size = batch_size(operands, dims)
    x, residual = (batch_at(a, d, 0, size) for a, d in ((x, dims[1]), (residual, dims[2])))
    if size == 0:
        return [jnp.zeros_like(x), jnp.zeros_like(residual)], [0, 0]
    if dims[3] is not None or not _has_room(x, **parameters):
        scale = batch_at(scale, dims[3], 0, size)
        calls = [
            _bind(position, *each, **parameters) for each in zip(x, residual, scale, strict=True)
        ]
        return [jnp.stack(results) for results in zip(*calls, strict=True)], [0, 0]
    rows = (size * x.shape[1], x.shape[2])
    results = _bind(position, x.reshape(rows), residual.reshape(rows), scale, **parameters)
    return [r.reshape(x.shape) for r in results], [0, 0]


def _has_room(
    x: jax.Array, *, algorithm: Algorithm, is_staged: bool, num_ranks: int, **_: Any
) -> bool:
    """Returns whether the algorithm chosen for one element has room for x [batch, rows, hidden]."""
    if algorithm is not Algorithm.LOW_LATENCY:
        return not is_staged
    slot = limits.SLOT_BYTES
    row_slots = -(-x.shape[2] * x.dtype.itemsize // slot)
    return x.shape[0] * x.shape[1] * row_slots * slot <= limits.slot_payload(num_ranks)


_bind = make_primitive(
    "all_reduce_residual_rmsnorm",
    _results,
    platforms=("cpu", "cuda"),
    attributes=("algorithm", "eps", "group"),
    varying=_varying,
    batch=_batch,
)


def all_reduce_residual_rmsnorm(
    spec: ReduceSpec, x: jax.Array, residual: jax.Array, scale: jax.Array, eps: float
) -> tuple[jax.Array, jax.Array]:
    """Returns (normed, new_residual), [rows, hidden] like x and residual."""
    if spec.backend == "xla":
        return stock.all_reduce_residual_rmsnorm(spec, x, residual, scale, eps)
    position = check_mesh(spec.group.position(), spec.group, op=spec.op)
    normed, new_residual = _bind(
        position,
        x,
        residual,
        scale,
        algorithm=spec.algorithm,
        axes=spec.group.axes,
        eps=eps,
        group=spec.group.identity,
        is_staged=spec.group.staging_bytes is not None,
        num_ranks=spec.group.num_ranks,
        op=spec.op,
    )
    return normed, new_residual
