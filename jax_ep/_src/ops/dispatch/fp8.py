"""Conversion of rows to fp8 with a scale for each block of elements, and back."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.typing import DTypeLike

from jax_ep._src.base import config, exact
from jax_ep._src.base.checks import alternatives
from jax_ep._src.base.errors import DTypeError, ShapeError
from jax_ep._src.base.options import Quantize, Scales, ScalesName
from jax_ep._src.ops.common.checks import FLOAT_DTYPES, Checks

FP8_DTYPES = (jnp.float8_e4m3fn, jnp.float8_e5m2)
# Scales are f32, or exponent bytes of the microscaling formats: as uint8, or in JAX's type.
SCALE_DTYPES = (jnp.float32, jnp.uint8, jnp.float8_e8m0fnu)
_E8M0_BIAS = 127
_E8M0_NAN = 255
_F32_MANTISSA_BITS = 23
_F32_MAGNITUDE = np.uint32(0x7FFFFFFF)
_F32_INFINITY = np.uint32(0x7F800000)
_F32_TINY = np.finfo(np.float32).tiny


def quantize_fp8(
    x: jax.Array,
    *,
    block: int = config.FP8_BLOCK,
    scales: ScalesName = "f32",
    dtype: DTypeLike = jnp.float8_e4m3fn,
) -> tuple[jax.Array, jax.Array]:
    """Rounds rows to fp8, with one scale per block of consecutive elements.

    Args:
      x: [num_tokens, hidden] bf16, f16 or f32; hidden a positive multiple of block.
      block: elements per scale; DeepSeek-V3 uses 128.
      scales: "f32"; or "e8m0": powers of two as exponent bytes (uint8, exponent + 127), as in the
        microscaling formats. `jax.lax.bitcast_convert_type` turns them into float8_e8m0fnu.
      dtype: float8_e4m3fn or float8_e5m2.

    Returns:
      (fp8 [num_tokens, hidden], scales [num_tokens, hidden / block] f32 or uint8), which dispatch
      takes as x. The largest element of a block maps to at most the largest fp8 number. A block
      with NaN or infinity has NaN or infinity as its scale (e8m0: 255), and is NaN when
      dequantised. Numbers are rounded even if the same program widens them again.

    Collective: no. Gradient: of no use, because the function rounds; see `dispatch_fp8`.
    Raises: ShapeError, ConfigError, DTypeError.
    Source: DeepSeek-V3 (2024), fine-grained quantisation; OCP microscaling formats (2023).
    """
    check = Checks("quantize_fp8")
    dtype = result_dtype(check, dtype, FP8_DTYPES)
    kind = check.choice(Scales, scales, name="scales")
    x = check.array(x, name="x")
    check.dtype(x, FLOAT_DTYPES, name="x")
    block = check.blocks(x, block)
    blocks = jnp.asarray(x).astype(jnp.float32).reshape(x.shape[0], x.shape[1] // block, block)
    largest = np.float32(ml_dtypes.finfo(dtype).max)  # type: ignore[no-untyped-call]
    # Absolute values keep their order as integers, with NaN last; a maximum of floats may lose NaN.
    magnitudes = jax.lax.bitcast_convert_type(blocks, jnp.uint32) & _F32_MAGNITUDE
    most = jnp.max(magnitudes, axis=-1)
    if kind is Scales.E8M0:
        stored, inverse = _power_of_two(most, largest)
    else:
        scale = jax.lax.bitcast_convert_type(most, jnp.float32) * (np.float32(1) / largest)
        # A block of zeros gets a scale that is not zero, so the division is defined.
        stored = jnp.where(scale < _F32_TINY, _F32_TINY, scale)
        inverse = 1 / stored
    # XLA, too, turns a division by a broadcast scale into this product.
    scaled = jnp.clip(blocks * inverse[..., None], -largest, largest)
    return exact.kept(scaled.astype(dtype)).reshape(x.shape), stored


def _power_of_two(most: jax.Array, largest: np.float32) -> tuple[jax.Array, jax.Array]:
    """Returns the least power of two >= most / largest, as (exponent byte, f32 inverse).

    `most` holds the bits of f32 numbers, `largest` is f32. Numbers that are not finite give the
    byte of NaN.
    """
    exponent, mantissa = divmod(int(largest.view(np.uint32)), 1 << _F32_MANTISSA_BITS)
    # A mantissa larger than that of `largest` carries into the exponent.
    ceiling = (most + np.uint32((1 << _F32_MANTISSA_BITS) - 1 - mantissa)) >> _F32_MANTISSA_BITS
    byte = jnp.maximum(ceiling.astype(jnp.int32) - (exponent - _E8M0_BIAS), 1)
    stored = jnp.where(most >= _F32_INFINITY, _E8M0_NAN, byte).astype(jnp.uint8)
    return stored, _as_f32((2 * _E8M0_BIAS - byte).astype(jnp.uint8))


def dequantize_fp8(x: jax.Array, scales: jax.Array, dtype: DTypeLike = jnp.bfloat16) -> jax.Array:
    """Converts the result of quantize_fp8 back: [rows, hidden] of `dtype`.

    Args:
      x: [rows, hidden] float8_e4m3fn or float8_e5m2.
      scales: [rows, hidden / block] f32, or exponent bytes: uint8 or float8_e8m0fnu; 255 is NaN.
      dtype: dtype of the result: bf16, f16 or f32.

    Returns:
      x * scales, computed in f32, rounded once.

    Collective: no. Gradient: of f32 scales, the gradient of the product; of x, of no use, because
      JAX rounds it to fp8; see `dispatch_fp8`.
    Raises: ShapeError, DTypeError.
    Source: as in `quantize_fp8`.
    """
    check = Checks("dequantize_fp8")
    dtype = result_dtype(check, dtype, FLOAT_DTYPES)
    x = check.array(x, name="x")
    check.dtype(x, FP8_DTYPES, name="x")
    if x.ndim != 2 or x.shape[1] < 1:
        raise ShapeError(
            f"{check.op}: x must be [rows, hidden] with hidden positive, got shape {x.shape}"
        )
    scales = check.array(scales, name="scales")
    check.dtype(scales, SCALE_DTYPES, name="scales")
    rows, hidden = x.shape
    num_blocks = scales.shape[1] if scales.ndim == 2 else 0
    if num_blocks < 1 or scales.shape[0] != rows or hidden % num_blocks:
        raise ShapeError(
            f"{check.op}: scales must be [rows={rows}, num_blocks] with num_blocks a divisor of "
            f"hidden={hidden}, got shape {scales.shape}"
        )
    scales = jnp.asarray(scales)
    blocks = jnp.asarray(x).astype(jnp.float32).reshape(rows, num_blocks, hidden // num_blocks)
    if scales.dtype != jnp.float32:
        byte = jax.lax.bitcast_convert_type(scales, jnp.uint8)
        # 2**-127 is subnormal, and XLA:CPU takes it for zero: halve the number, double the scale.
        blocks = jnp.where(byte[..., None] == 0, blocks * 0.5, blocks)
        scales = _as_f32(jnp.maximum(byte, 1))
    return (blocks * scales[..., None]).reshape(x.shape).astype(dtype)


def result_dtype(check: Checks, dtype: Any, dtypes: Sequence[Any]) -> Any:
    """Returns the dtype, in whatever form the caller wrote it; it must be one of `dtypes`."""
    allowed = [jnp.dtype(d) for d in dtypes]
    # A conversion would raise NumPy's own error for an argument that is no dtype.
    for d in allowed:
        if d == dtype:
            return d
    names = alternatives([d.name for d in allowed])
    raise DTypeError(f"{check.op}: dtype must be {names}, got {dtype!r}")


def round_rows(x: jax.Array, how: Quantize) -> tuple[jax.Array, jax.Array]:
    """Rounds rows as the kernel of a low-latency dispatch does: rows and scales."""
    if how is Quantize.FP8:
        return quantize_fp8(x, scales="f32")
    rounded, exponents = quantize_fp8(x, scales="e8m0")
    return rounded, exponents if how is Quantize.FP8_E8M0 else _as_f32(exponents)


def _as_f32(exponent_byte: jax.Array) -> jax.Array:
    """Converts exponent bytes to f32: 1 to 254 are exponents of normal numbers, 255 is NaN."""
    bits = exponent_byte.astype(jnp.uint32) << _F32_MANTISSA_BITS
    power: jax.Array = jax.lax.bitcast_convert_type(bits, jnp.float32)
    return jnp.where(exponent_byte == _E8M0_NAN, np.float32(np.nan), power)
