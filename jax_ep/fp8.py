"""Rows to fp8 with a scale for each block of elements, and back."""

import enum
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.typing import DTypeLike

from jax_ep import _checks, _exact, config
from jax_ep.errors import DTypeError, ShapeError

FP8_DTYPES = (jnp.float8_e4m3fn, jnp.float8_e5m2)
# Of scales as bytes of the microscaling formats, or as that type of JAX's.
SCALE_DTYPES = (jnp.float32, jnp.uint8, jnp.float8_e8m0fnu)
_E8M0_BIAS = 127
_E8M0_NAN = 255
_F32_MANTISSA_BITS = 23
_F32_MAGNITUDE = np.uint32(0x7FFFFFFF)
_F32_INFINITY = np.uint32(0x7F800000)
_F32_TINY = np.finfo(np.float32).tiny


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
        microscaling formats have them. `jax.lax.bitcast_convert_type` makes float8_e8m0fnu of them.
      dtype: float8_e4m3fn or float8_e5m2.

    Returns:
      (fp8 [num_tokens, hidden], scales [num_tokens, hidden / block] f32 or uint8), which dispatch
      takes as x. The largest element of a block maps to at most the largest fp8 number. A block
      with NaN or infinity has one of them as its scale (e8m0: 255), and is NaN when dequantised.
      Numbers are rounded also where the same program widens them again.

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
    largest = np.float32(ml_dtypes.finfo(dtype).max)  # type: ignore[no-untyped-call]
    # As integers, absolute values are in their order, NaN last; a maximum of floats may lose it.
    magnitudes = jax.lax.bitcast_convert_type(blocks, jnp.uint32) & _F32_MAGNITUDE
    most = jnp.max(magnitudes, axis=-1)
    if kind is Scales.E8M0:
        stored, inverse = _power_of_two(most, largest)
    else:
        scale = jax.lax.bitcast_convert_type(most, jnp.float32) * (np.float32(1) / largest)
        # A block of zeros keeps a scale that divides.
        stored = jnp.where(scale < _F32_TINY, _F32_TINY, scale)
        inverse = 1 / stored
    # XLA divides by a broadcast scale in this way.
    scaled = jnp.clip(blocks * inverse[..., None], -largest, largest)
    return _exact.kept(scaled.astype(dtype)).reshape(x.shape), stored


def _power_of_two(most: jax.Array, largest: np.float32) -> tuple[jax.Array, jax.Array]:
    """The least power of two that is at least most / largest: (exponent byte, f32 inverse).

    Both are f32, the first as its bits. The byte of what is not finite is that of NaN.
    """
    exponent, mantissa = divmod(int(largest.view(np.uint32)), 1 << _F32_MANTISSA_BITS)
    # The carry of a larger mantissa.
    ceiling = (most + np.uint32((1 << _F32_MANTISSA_BITS) - 1 - mantissa)) >> _F32_MANTISSA_BITS
    byte = jnp.maximum(ceiling.astype(jnp.int32) - (exponent - _E8M0_BIAS), 1)
    stored = jnp.where(most >= _F32_INFINITY, _E8M0_NAN, byte).astype(jnp.uint8)
    return stored, _as_f32((2 * _E8M0_BIAS - byte).astype(jnp.uint8))


def dequantize_fp8(x: jax.Array, scales: jax.Array, dtype: DTypeLike = jnp.bfloat16) -> jax.Array:
    """The inverse of quantize_fp8: [rows, hidden] of `dtype`.

    Args:
      x: [rows, hidden] float8_e4m3fn or float8_e5m2.
      scales: [rows, hidden / block] f32, or exponent bytes: uint8 or float8_e8m0fnu; 255 is NaN.
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
    _checks.require_dtype(scales, SCALE_DTYPES, op=op, argument="scales")
    rows, hidden = x.shape
    num_blocks = scales.shape[1] if scales.ndim == 2 else 0
    if num_blocks < 1 or scales.shape[0] != rows or hidden % num_blocks:
        raise ShapeError(
            f"{op}: scales must be [rows={rows}, a divisor of hidden={hidden}], got shape "
            f"{scales.shape}"
        )
    scales = jnp.asarray(scales)
    blocks = jnp.asarray(x).astype(jnp.float32).reshape(rows, num_blocks, hidden // num_blocks)
    if scales.dtype != jnp.float32:
        byte = jax.lax.bitcast_convert_type(scales, jnp.uint8)
        # 2**-127 is a subnormal, which XLA:CPU takes for zero: twice as much, of half the number.
        blocks = jnp.where(byte[..., None] == 0, blocks * 0.5, blocks)
        scales = _as_f32(jnp.maximum(byte, 1))
    return (blocks * scales[..., None]).reshape(x.shape).astype(dtype)


def _require_result(dtype: Any, dtypes: Sequence[Any], *, op: str) -> Any:
    """One of the dtypes, however it is written."""
    allowed = [jnp.dtype(d) for d in dtypes]
    # Compared, not converted: that would raise NumPy's own error for what is no dtype.
    for d in allowed:
        if d == dtype:
            return d
    names = config.alternatives([d.name for d in allowed])
    raise DTypeError(f"{op}: dtype must be {names}, got {dtype!r}")


def _as_f32(exponent_byte: jax.Array) -> jax.Array:
    """Of a byte from 1 on, which is the exponent of a normal f32, or 255, NaN."""
    bits = exponent_byte.astype(jnp.uint32) << _F32_MANTISSA_BITS
    power: jax.Array = jax.lax.bitcast_convert_type(bits, jnp.float32)
    return jnp.where(exponent_byte == _E8M0_NAN, np.float32(np.nan), power)
