"""fp8 rows with a scale per block, and a dispatch of them that can be differentiated."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.typing import DTypeLike

from jax_ep import config
from jax_ep.errors import ConfigError, DTypeError, ShapeError

FP8_DTYPES = (jnp.float8_e4m3fn, jnp.float8_e5m2)
_E8M0_BIAS = 127


def quantize_fp8(
    x: jax.Array,
    *,
    block: int = config.FP8_BLOCK,
    scales: str = "f32",
    dtype: DTypeLike = jnp.float8_e4m3fn,
) -> tuple[jax.Array, jax.Array]:
    """Rounds rows to fp8, with one scale per block of consecutive elements.

    Args:
      x: [num_tokens, hidden] bf16, f16 or f32; hidden a multiple of block.
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
    if jnp.dtype(dtype) not in [jnp.dtype(d) for d in FP8_DTYPES]:
        raise DTypeError(f"quantize_fp8: dtype must be float8_e4m3fn or float8_e5m2, got {dtype}")
    if x.ndim != 2 or block < 1 or x.shape[1] % block:
        raise ShapeError(
            f"quantize_fp8: x must be [num_tokens, hidden], hidden a multiple of block={block}, "
            f"got shape {x.shape}"
        )
    blocks = x.astype(jnp.float32).reshape(x.shape[0], -1, block)
    largest = float(ml_dtypes.finfo(dtype).max)  # type: ignore[no-untyped-call]
    scale = jnp.max(jnp.abs(blocks), axis=-1) / largest
    # A block of zeros keeps a scale that divides.
    scale = jnp.maximum(scale, np.finfo(np.float32).tiny)
    if scales == "e8m0":
        mantissa, exponent = jnp.frexp(scale)
        exponent = exponent - (mantissa == 0.5)  # an exact power of two is its own ceiling
        stored = jnp.clip(exponent + _E8M0_BIAS, 0, 254).astype(jnp.uint8)
        scale = _as_f32(stored)
    elif scales == "f32":
        stored = scale
    else:
        raise ConfigError(f"quantize_fp8: scales must be one of 'f32', 'e8m0', got {scales!r}")
    scaled = jnp.clip(blocks / scale[..., None], -largest, largest)
    return scaled.astype(dtype).reshape(x.shape), stored


def dequantize_fp8(x: jax.Array, scales: jax.Array, dtype: DTypeLike = jnp.bfloat16) -> jax.Array:
    """The inverse of quantize_fp8: [rows, hidden] of `dtype`.

    Args:
      x: [rows, hidden] fp8.
      scales: [rows, hidden / block] f32, or uint8 exponent bytes.
      dtype: of the result.

    Returns:
      x * scales, computed in f32, rounded once.
    """
    wide = scales if scales.dtype == jnp.float32 else _as_f32(scales)
    blocks = x.astype(jnp.float32).reshape(*wide.shape, -1) * wide[..., None]
    return blocks.reshape(x.shape).astype(dtype)


def _as_f32(exponent_byte: jax.Array) -> jax.Array:
    # The byte is the exponent field of an f32; 0 stands for 2**-127, which f32 has as a subnormal.
    bits = jnp.maximum(exponent_byte.astype(jnp.uint32), 1) << 23
    return jax.lax.bitcast_convert_type(bits, jnp.float32)
