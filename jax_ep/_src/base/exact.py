"""Values that stay what the program says, whatever the compiler makes of the code around them.

XLA drops a rounding whose result is widened again, contracts a product and a sum to one rounding,
and takes 0 + x for x, which loses the sign of a zero. Its barriers are gone before it has done all
of that. What lies between two operations on integers it leaves alone.
"""

from typing import Any

import jax
import jax.numpy as jnp


@jax.custom_jvp
def kept(x: jax.Array) -> jax.Array:
    """`x`, rounded to its dtype, and not fused into the sums that follow.

    One NaN becomes another one. A function that changes no value would be taken away again.
    """
    bits = _as_bits(x)
    ones = _word(bits, ~0)  # a NaN in every dtype that we add or round to
    if x.dtype == jnp.float8_e4m3fn:  # has one NaN of each sign
        changed = jnp.where(bits == ones, ones >> 1, bits)
    else:
        changed = jnp.minimum(bits, ones - 1)
    return jax.lax.bitcast_convert_type(changed, x.dtype)


@kept.defjvp
def _kept_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    return kept(*primals), tangents[0]


def rounded(x: jax.Array, dtype: Any) -> jax.Array:
    """A sum, as a result of ours, rounded as `kept`; the program behind it is simplified by itself.

    As behind a custom call: else the gradients of a training step were seen to differ by a bit. So
    they were, with JAX 0.10, where a sum that needs no rounding went through `kept`.
    """
    narrow = x.astype(dtype)
    result: jax.Array = jax.lax.optimization_barrier(
        narrow if narrow.dtype == x.dtype else kept(narrow)
    )
    return result


def positive_zeros(x: jax.Array) -> jax.Array:
    """`x` with +0 for -0: of a sum, what it is if it begins with +0. It has no gradient."""
    bits = _as_bits(x)
    negative_zero = _word(bits, 1 << (8 * x.dtype.itemsize - 1))
    changed = jnp.where(bits == negative_zero, _word(bits, 0), bits)
    return jax.lax.bitcast_convert_type(changed, x.dtype)


def _as_bits(x: jax.Array) -> jax.Array:
    bits: jax.Array = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")
    return bits


def _word(bits: jax.Array, value: int) -> jax.Array:
    """One of the type of `bits`."""
    return jnp.asarray(value % (1 << (8 * bits.dtype.itemsize)), bits.dtype)
