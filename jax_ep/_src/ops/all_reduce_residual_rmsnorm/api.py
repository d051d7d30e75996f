"""all_reduce_residual_rmsnorm: the steps between two tensor-parallel layers, in one kernel."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_ep._src.base import jax_compat, limits
from jax_ep._src.base.errors import ConfigError, ShapeError
from jax_ep._src.base.options import Algorithm, AlgorithmName, BackendName
from jax_ep._src.base.spec import ReduceSpec
from jax_ep._src.group.group import Group
from jax_ep._src.ops.all_reduce import choice
from jax_ep._src.ops.all_reduce.vjp import move, named, typed
from jax_ep._src.ops.all_reduce_residual_rmsnorm import stock, vjp
from jax_ep._src.ops.common.checks import FLOAT_DTYPES, Checks

_check = Checks("all_reduce_residual_rmsnorm")


def all_reduce_residual_rmsnorm(
    x: jax.Array,
    residual: jax.Array,
    scale: jax.Array,
    *,
    eps: float = 1e-6,
    group: Group,
    algorithm: AlgorithmName = "auto",
    allow_psum: bool = True,
    backend: BackendName | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Adds up x over the ranks, adds the residual, and normalises the sum by its root mean square.

    new_residual = all_reduce(x) + residual. Each sum is rounded to the dtype of x, so new_residual
    has the bits of the two operations one by one. normed = new_residual / sqrt(mean(new_residual
    ** 2) + eps) * scale, in f32, rounded once; its bits are equal on every rank.

    Args:
      x: [..., hidden] bf16, f16 or f32: this rank's term.
      residual: [..., hidden] like x, equal on every rank.
      scale: [hidden], f32 or the dtype of x.
      eps: number added to the mean square. Static.
      group: the ranks.
      algorithm: "low_latency", "one_shot" or "psum", as in `all_reduce`; "psum" adds up and
        normalises in separate kernels. "auto": chosen by the table. If the table has no entry for
        this size, or if a row has more than 64 KiB, `all_reduce` adds up and XLA does the rest.
      allow_psum: as in `all_reduce`.
      backend: as in `all_reduce`.

    Returns:
      (normed, new_residual), both like x. They vary over the group's axes only if residual or
      scale does.

    Collective: yes.
    Gradient: the gradient of the three operations one by one; under check_vma=True it moves no
      data between the ranks.
    Raises: ShapeError, DTypeError, ConfigError, GroupError while tracing; PeerTimeoutError,
      GroupError from `group.check()`.
    Source: the fused all-reduces of TensorRT-LLM (NVIDIA, 2024).
    """
    x = jnp.asarray(_check.array(x, name="x"))
    residual = jnp.asarray(_check.array(residual, name="residual"))
    scale = jnp.asarray(_check.array(scale, name="scale"))
    _check.dtype(x, FLOAT_DTYPES, name="x")
    if x.ndim == 0:
        raise ShapeError(f"{_check.op}: x must be [..., hidden], got shape ()")
    if x.shape[-1] == 0:
        raise ShapeError(
            f"{_check.op}: x must be [..., hidden] with hidden positive, got shape {x.shape}"
        )
    _check.shape(residual, x.shape, name="residual")
    _check.dtype(residual, (x.dtype,), name="residual")
    _check.shape(scale, x.shape[-1:], name="scale")
    _check.dtype(scale, (jnp.float32, x.dtype), name="scale")
    eps = _check.positive_number(eps, name="eps", or_zero=True)
    if eps > float(np.finfo(np.float32).max):
        raise ConfigError(f"{_check.op}: eps must be finite in float32, got {eps}")
    spec = _choose(group, x, algorithm, allow_psum=allow_psum, backend=backend)
    axes = group.spec.axes
    operands = _vary(axes, x, residual, scale)
    terms, onto = (a.reshape(-1, x.shape[-1]) for a in operands[:2])
    if spec is None:
        total = move(_all_reduce_spec(group, terms, allow_psum=allow_psum, backend=backend), terms)
        new_residual = named(stock.add(total, onto))
        results = stock.rms_norm(new_residual, operands[2], eps), new_residual
    elif spec.algorithm is Algorithm.PSUM:
        call = stock.all_reduce_residual_rmsnorm
        normed, new_residual = call(spec, terms, onto, operands[2], eps)
        results = normed, named(new_residual)
    else:
        results = vjp.all_reduce_residual_rmsnorm(typed(spec, terms), eps, terms, onto, operands[2])
    normed, new_residual = (r.reshape(x.shape) for r in results)
    return normed, new_residual


def _choose(
    group: Any, x: jax.Array, algorithm: str, *, allow_psum: bool, backend: str | None
) -> ReduceSpec | None:
    """Returns the spec of the fused call; None: all_reduce carries the sum, XLA the rest."""
    _check.group(group)
    row_bytes = x.shape[-1] * x.dtype.itemsize
    is_wide = row_bytes > limits.MAX_NORM_ROW_BYTES
    if is_wide and algorithm == "auto":
        return None
    if is_wide and algorithm != "psum":
        raise ConfigError(
            f"{_check.op}: algorithm={algorithm!r} takes rows of at most "
            f"{limits.MAX_NORM_ROW_BYTES} bytes, got {row_bytes}"
        )
    spec = choice.make_spec(
        _check,
        group,
        x,
        x.nbytes,
        algorithm=algorithm,
        allow_psum=allow_psum,
        backend=backend,
        dtypes=FLOAT_DTYPES,
        padding=slot_padding(x),
    )
    # An all_reduce may still carry the sum: it has other algorithms than the fused call.
    return None if algorithm == "auto" and spec.algorithm is Algorithm.PSUM else spec


def _all_reduce_spec(
    group: Group, terms: jax.Array, *, allow_psum: bool, backend: str | None
) -> ReduceSpec:
    """Returns the spec of the all_reduce that replaces the fused kernel."""
    return choice.make_spec(
        _check,
        group,
        terms,
        terms.nbytes,
        kernel="all_reduce",
        algorithm="auto",
        allow_psum=allow_psum,
        backend=backend,
    )


def slot_padding(x: jax.Array) -> int:
    """Returns the bytes that slots hold besides x: each row begins with a new slot."""
    row_bytes = x.shape[-1] * x.dtype.itemsize
    return -row_bytes % limits.SLOT_BYTES * (x.size // max(1, x.shape[-1]))


def _vary(
    axes: tuple[str, ...], x: jax.Array, residual: jax.Array, scale: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Casts the operands, so that a cotangent has the type of its operand.

    All operands vary over each other axis that one of them varies over. Over the group's axes x
    always varies; residual and scale vary over one of them only if either of the two does.
    """
    own = set(axes)
    varying = [jax_compat.varying_axes(jax.typeof(a)) for a in (x, residual, scale)]
    others = frozenset().union(*varying) - own
    beside = others | (varying[1] | varying[2]) & own
    (x,) = jax_compat.vary_alike([x], [*others, *axes])
    residual, scale = (jax_compat.vary_alike([a], [*beside])[0] for a in (residual, scale))
    return x, residual, scale
