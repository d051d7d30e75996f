"""Arrays over the tokens of all ranks, from XLA's collectives and plain indexing."""

import jax
import jax.numpy as jnp

from jax_ep._src.base.spec import GroupSpec


def gather_tokens(group: GroupSpec, x: jax.Array) -> jax.Array:
    """Gathers [num_ranks * T, ...] from every rank's [T, ...]."""
    gathered: jax.Array = jax.lax.all_gather(x, group.axes, tiled=True)
    return gathered


def own_tokens(group: GroupSpec, x: jax.Array) -> jax.Array:
    """Returns this rank's part of the result of gather_tokens."""
    num_tokens = x.shape[0] // group.num_ranks
    first = jax.lax.axis_index(group.axes) * num_tokens
    own: jax.Array = jax.lax.dynamic_slice_in_dim(x, first, num_tokens)
    return own


def take(x: jax.Array, index: jax.Array, *, fill: int = 0) -> jax.Array:
    """Returns x[index], with `fill` where the index is -1."""
    taken: jax.Array
    valid = (index >= 0).reshape(index.shape + (1,) * (x.ndim - 1))
    taken = jnp.where(valid, x[jnp.maximum(index, 0)], jnp.asarray(fill, x.dtype))
    return taken


def invert(row: jax.Array, size: int) -> jax.Array:
    """Returns [size] int32: inverse[row[i]] = i, or -1 if no i points there. -1 points nowhere."""
    target = jnp.where(row < 0, size, row)
    numbers = jnp.arange(row.shape[0], dtype=jnp.int32)
    return jnp.full((size,), -1, jnp.int32).at[target].set(numbers, mode="drop")


def count(ids: jax.Array, size: int) -> jax.Array:
    target = jnp.where(ids < 0, size, ids).reshape(-1)
    return jnp.zeros((size,), jnp.int32).at[target].add(1, mode="drop")
