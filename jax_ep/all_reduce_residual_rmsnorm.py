"""all_reduce_residual_rmsnorm: what stands between two tensor-parallel layers, in one kernel."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_ep import _backends, _checks, _jax_compat, _limits, _reduce, _xla_reduce
from jax_ep._spec import ReduceSpec
from jax_ep.config import Algorithm
from jax_ep.errors import ConfigError, ShapeError
from jax_ep.group import Group

_OP = "all_reduce_residual_rmsnorm"


def all_reduce_residual_rmsnorm(
    x: jax.Array,
    residual: jax.Array,
    scale: jax.Array,
    *,
    eps: float = 1e-6,
    group: Group,
    algorithm: str = "auto",
    allow_psum: bool = True,
    backend: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Adds up x over the ranks, adds the residual, and normalises the sum by its root mean square.

    new_residual = all_reduce(x) + residual, each sum rounded to the dtype of x, so that it has the
    bits of the two operations one by one. normed = new_residual / sqrt(mean(new_residual ** 2) +
    eps) * scale, in f32, rounded once; its bits are the same on every rank.

    Args:
      x: [..., hidden] bf16, f16 or f32: this rank's term.
      residual: [..., hidden] like x, the same on every rank.
      scale: [hidden], f32 or the dtype of x.
      eps: added to the mean square. Static.
      group: the ranks.
      algorithm: "low_latency", "one_shot" or "psum", as in `all_reduce`; "psum" adds up and
        normalises by separate kernels. "auto": by the table; where that has nothing for them, and
        for rows of more than 64 KiB, `all_reduce`, then the rest by XLA.
      allow_psum: as in `all_reduce`.
      backend: as in `all_reduce`.

    Returns:
      (normed, new_residual), both like x. They vary over the group's axes only where residual or
      scale does.

    Collective: yes.
    Gradient: that of the three operations one by one; under check_vma=True it moves nothing
      between the ranks.
    Raises: ShapeError, DTypeError, ConfigError, GroupError while tracing; PeerTimeoutError,
      GroupError from `group.check()`.
    Source: the fused all-reduces of TensorRT-LLM (NVIDIA, 2024).
    """
    x = jnp.asarray(_checks.require_array(x, op=_OP, argument="x"))
    residual = jnp.asarray(_checks.require_array(residual, op=_OP, argument="residual"))
    scale = jnp.asarray(_checks.require_array(scale, op=_OP, argument="scale"))
    floats = _checks.FLOAT_DTYPES
    _checks.require_dtype(x, floats, op=_OP, argument="x")
    if x.ndim == 0:
        raise ShapeError(f"{_OP}: x must be [..., hidden], got shape ()")
    if x.shape[-1] == 0:
        raise ShapeError(f"{_OP}: x must be [..., hidden], hidden positive, got shape {x.shape}")
    _checks.require_shape(residual, x.shape, op=_OP, argument="residual")
    _checks.require_dtype(residual, (x.dtype,), op=_OP, argument="residual")
    _checks.require_shape(scale, x.shape[-1:], op=_OP, argument="scale")
    _checks.require_dtype(scale, (jnp.float32, x.dtype), op=_OP, argument="scale")
    eps = _checks.require_positive_number(eps, op=_OP, argument="eps", or_zero=True)
    if eps > float(np.finfo(np.float32).max):
        raise ConfigError(f"{_OP}: eps must be finite in float32, got {eps}")
    spec = _choose(group, x, algorithm, allow_psum=allow_psum, backend=backend)
    axes = group.spec.axes
    operands = _vary(axes, x, residual, scale)
    terms, onto = (a.reshape(-1, x.shape[-1]) for a in operands[:2])
    if spec is None:
        total = _reduce.move(
            _all_reduce_spec(group, terms, allow_psum=allow_psum, backend=backend), terms
        )
        new_residual = _reduce.named(_xla_reduce.add(total, onto))
        results = _xla_reduce.rms_norm(new_residual, operands[2], eps), new_residual
    elif spec.algorithm is Algorithm.PSUM:
        call = _xla_reduce.all_reduce_residual_rmsnorm
        normed, new_residual = call(spec, terms, onto, operands[2], eps)
        results = normed, _reduce.named(new_residual)
    else:
        results = _fused(_reduce.typed(spec, terms), eps, terms, onto, operands[2])
    normed, new_residual = (r.reshape(x.shape) for r in results)
    return normed, new_residual


def _choose(
    group: Any, x: jax.Array, algorithm: str, *, allow_psum: bool, backend: str | None
) -> ReduceSpec | None:
    """None: an all_reduce that chooses for itself, then the rest."""
    _checks.require_group(group, op=_OP)
    row_bytes = x.shape[-1] * x.dtype.itemsize
    is_wide = row_bytes > _limits.MAX_NORM_ROW_BYTES
    if is_wide and algorithm == "auto":
        return None
    if is_wide and algorithm != "psum":
        raise ConfigError(
            f"{_OP}: algorithm={algorithm!r} takes rows of at most {_limits.MAX_NORM_ROW_BYTES} "
            f"bytes, got {row_bytes}"
        )
    spec = _reduce.make_spec(
        group,
        x,
        x.nbytes,
        op=_OP,
        algorithm=algorithm,
        allow_psum=allow_psum,
        backend=backend,
        dtypes=_checks.FLOAT_DTYPES,
        padding=packet_padding(x),
    )
    # The sum alone may still be ours: other algorithms carry it.
    return None if algorithm == "auto" and spec.algorithm is Algorithm.PSUM else spec


def _all_reduce_spec(
    group: Group, terms: jax.Array, *, allow_psum: bool, backend: str | None
) -> ReduceSpec:
    """Of the all_reduce that stands in for the kernel."""
    return _reduce.make_spec(
        group,
        terms,
        terms.nbytes,
        op=_OP,
        kernel="all_reduce",
        algorithm="auto",
        allow_psum=allow_psum,
        backend=backend,
    )


def packet_padding(x: jax.Array) -> int:
    """Bytes: each row begins with packets of its own."""
    row_bytes = x.shape[-1] * x.dtype.itemsize
    return -row_bytes % _limits.PACKET_GROUP_PAYLOAD * (x.size // max(1, x.shape[-1]))


def _vary(
    axes: tuple[str, ...], x: jax.Array, residual: jax.Array, scale: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Casts them, so that a cotangent has the type of its operand.

    All vary over the axes that one of them varies over; over the group's, residual and scale only
    if one of those two does.
    """
    own = set(axes)
    varying = [_jax_compat.varying_axes(jax.typeof(a)) for a in (x, residual, scale)]
    others = frozenset().union(*varying) - own
    beside = others | (varying[1] | varying[2]) & own
    (x,) = _jax_compat.vary_alike([x], [*others, *axes])
    residual, scale = (_jax_compat.vary_alike([a], [*beside])[0] for a in (residual, scale))
    return x, residual, scale


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _fused(
    spec: ReduceSpec, eps: float, x: jax.Array, residual: jax.Array, scale: jax.Array
) -> tuple[jax.Array, jax.Array]:
    call = _backends.get(spec.backend).all_reduce_residual_rmsnorm
    normed, new_residual = call(spec, x, residual, scale, eps)
    return _reduce.named(normed), _reduce.named(new_residual)


def _fused_fwd(spec: ReduceSpec, eps: float, *operands: jax.Array) -> Any:
    normed, new_residual = _fused.fun(spec, eps, *operands)
    return (normed, new_residual), (new_residual, operands[2])


def _fused_bwd(spec: ReduceSpec, eps: float, kept: Any, cts: Any) -> Any:
    new_residual, scale = kept
    ct_normed, ct_residual = cts
    _, back = jax.vjp(partial(_xla_reduce.rms_norm, eps=eps), new_residual, scale)
    ct_sum, ct_scale = back(ct_normed)
    ct_sum = ct_sum + ct_residual
    return _reduce.transpose_of_sum(spec, ct_sum), ct_sum, ct_scale


_fused.defvjp(_fused_fwd, _fused_bwd)
