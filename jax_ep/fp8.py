"""Rows to fp8 with a scale for each block of elements, and back."""

import enum
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.typing import DTypeLike

from jax_ep import _checks, config
from jax_ep.errors import DTypeError, ShapeError

FP8_DTYPES = (jnp.float8_e4m3fn, jnp.float8_e5m2)
_E8M0_BIAS = 127


class Scales(enum.Enum):
    """What a scale is stored as."""

    F32 = 0
    E8M0 = 1


def quantize_fp8(
    x: jax.Array,
    *,
    block: int = config.FP8_BLOCK,
    scales: str = "f32",
    dtype: DTypeLike = jnp.float8_e4m3fn,
) -> tuple[jax.Array, jax.Array]:
    """Rounds rows to fp8, with one scale per block of consecutive elements.

    Args:
      x: [num_tokens, hidden] bf16, f16 or f32; hidden a positive multiple of block.
      block: elements per scale; DeepSeek-V3 uses 128.
      scales: "f32", or "e8m0": powers of two as exponent bytes (uint8, exponent + 127), as the
        microscaling formats have them.
      dtype: float8_e4m3fn or float8_e5m2.

    Returns:
      (fp8 [num_tokens, hidden], scales [num_tokens, hidden / block] f32 or uint8), which dispatch
      takes as x. The largest element of a block maps to at most the largest fp8 number.

    Collective: no. Gradient: none of use, it is a rounding; see `dispatch_fp8`.
    Raises: ShapeError, ConfigError, DTypeError.
    Source: DeepSeek-V3 (2024), fine-grained quantisation; OCP microscaling formats (2023).
    """
    op = "quantize_fp8"
    dtype = _require_result(dtype, FP8_DTYPES, op=op)
    kind = config.choice(Scales, scales, op=op, argument="scales")
    x = _checks.require_array(x, op=op, argument="x")
    _checks.require_dtype(x, _checks.FLOAT_DTYPES, op=op, argument="x")
    block = _checks.require_blocks(x, block, op=op)
    blocks = jnp.asarray(x).astype(jnp.float32).reshape(x.shape[0], x.shape[1] // block, block)
    largest = float(ml_dtypes.finfo(dtype).max)  # type: ignore[no-untyped-call]
    scale = jnp.max(jnp.abs(blocks), axis=-1) / largest
    # A block of zeros keeps a scale that divides.
    scale = jnp.maximum(scale, np.finfo(np.float32).tiny)
    stored = scale
    if kind is Scales.E8M0:
        mantissa, exponent = jnp.frexp(scale)
        # An exact power of two is its own ceiling.
        exponent = jnp.where(mantissa == 0.5, exponent - 1, exponent)
        stored = jnp.clip(exponent + _E8M0_BIAS, 0, 254).astype(jnp.uint8)
        scale = _as_f32(stored)
    scaled = jnp.clip(blocks / scale[..., None], -largest, largest)
    return scaled.astype(dtype).reshape(x.shape), stored


def dequantize_fp8(x: jax.Array, scales: jax.Array, dtype: DTypeLike = jnp.bfloat16) -> jax.Array:
    """The inverse of quantize_fp8: [rows, hidden] of `dtype`.

    Args:
      x: [rows, hidden] float8_e4m3fn or float8_e5m2.
      scales: [rows, hidden / block] f32, or uint8 exponent bytes.
      dtype: of the result: bf16, f16 or f32.

    Returns:
      x * scales, computed in f32, rounded once.

    Collective: no. Gradient: of f32 scales, that of the product; of x none of use, since JAX rounds
      it to fp8; see `dispatch_fp8`.
    Raises: ShapeError, DTypeError.
    Source: as in `quantize_fp8`.
    """
    op = "dequantize_fp8"
    dtype = _require_result(dtype, _checks.FLOAT_DTYPES, op=op)
    x = _checks.require_array(x, op=op, argument="x")
    _checks.require_dtype(x, FP8_DTYPES, op=op, argument="x")
    if x.ndim != 2 or x.shape[1] < 1:
        raise ShapeError(f"{op}: x must be [rows, hidden], hidden positive, got shape {x.shape}")
    scales = _checks.require_array(scales, op=op, argument="scales")
    _checks.require_dtype(scales, (jnp.float32, jnp.uint8), op=op, argument="scales")
    rows, hidden = x.shape
    num_blocks = scales.shape[1] if scales.ndim == 2 else 0
    if num_blocks < 1 or scales.shape[0] != rows or hidden % num_blocks:
        raise ShapeError(
            f"{op}: scales must be [rows={rows}, a divisor of hidden={hidden}], got shape "
            f"{scales.shape}"
        )
    scales = jnp.asarray(scales)
    wide = scales if scales.dtype == jnp.float32 else _as_f32(scales)
    blocks = jnp.asarray(x).astype(jnp.float32).reshape(rows, num_blocks, hidden // num_blocks)
    return (blocks * wide[..., None]).reshape(x.shape).astype(dtype)


def _require_result(dtype: Any, dtypes: Sequence[Any], *, op: str) -> Any:
    """One of the dtypes, however it is written."""
    allowed = [jnp.dtype(d) for d in dtypes]
    # Compared, not converted: that would raise NumPy's own error for what is no dtype.
    for d in allowed:
        if d == dtype:
            return d
    names = ", ".join(d.name for d in allowed)
    raise DTypeError(f"{op}: dtype must be {names}, got {dtype!r}")


def _as_f32(exponent_byte: jax.Array) -> jax.Array:
    # The byte is the exponent field of an f32; 0 stands for 2**-127, which f32 has as a subnormal.
    bits = jnp.maximum(exponent_byte.astype(jnp.uint32), 1) << 23
    return jax.lax.bitcast_convert_type(bits, jnp.float32)
