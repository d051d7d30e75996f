"""Floating-point steps whose values XLA must not change when it compiles the code around them.

XLA drops a rounding whose result is widened again. It contracts a product and a sum to one
rounding. It replaces 0 + x by x, which loses the sign of a zero. XLA removes its optimization
barriers before the last of these changes. It leaves alone a step between two integer operations.
"""

from typing import Any

import jax
import jax.numpy as jnp


@jax.custom_jvp
def kept(x: jax.Array) -> jax.Array:
    """Returns `x` rounded to its dtype, and keeps XLA from fusing it into the sums that follow.

    One NaN becomes another NaN, because XLA would remove a function that changes no value.
    """
    bits = _as_bits(x)
    ones = _word(bits, ~0)  # a NaN in every dtype that we add or round to
    if x.dtype == jnp.float8_e4m3fn:  # a dtype with one NaN of each sign
        changed = jnp.where(bits == ones, ones >> 1, bits)
    else:
        changed = jnp.minimum(bits, ones - 1)
    return jax.lax.bitcast_convert_type(changed, x.dtype)


@kept.defjvp
def _kept_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    return kept(*primals), tangents[0]


def rounded(x: jax.Array, dtype: Any) -> jax.Array:
    """Returns a sum rounded like `kept`, behind a barrier as the result of an operation.

    The barrier makes XLA simplify the program that follows by itself, as behind a custom call.
    Without it, gradients of a training step differed by a bit. They also differed with JAX 0.10
    when a sum that needs no rounding went through `kept`.
    """
    narrow = x.astype(dtype)
    result: jax.Array = jax.lax.optimization_barrier(
        narrow if narrow.dtype == x.dtype else kept(narrow)
    )
    return result


def positive_zeros(x: jax.Array) -> jax.Array:
    """Returns `x` with +0 for -0, as a sum that begins with +0 would give it. Has no gradient."""
    bits = _as_bits(x)
    negative_zero = _word(bits, 1 << (8 * x.dtype.itemsize - 1))
    changed = jnp.where(bits == negative_zero, _word(bits, 0), bits)
    return jax.lax.bitcast_convert_type(changed, x.dtype)


def _as_bits(x: jax.Array) -> jax.Array:
    bits: jax.Array = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")
    return bits


def _word(bits: jax.Array, value: int) -> jax.Array:
    """Returns an integer of the type of `bits`."""
    return jnp.asarray(value % (1 << (8 * bits.dtype.itemsize)), bits.dtype)
