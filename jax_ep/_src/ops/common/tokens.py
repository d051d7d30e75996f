"""Arrays over the tokens of all ranks, from XLA's collectives and plain indexing."""

from typing import Any

import jax
import jax.numpy as jnp

from jax_ep._src.base.group_spec import GroupSpec
from jax_ep._src.ops.common.collectives import gather


def gather_tokens(group: GroupSpec, x: jax.Array, *, num_parts: int = 1) -> jax.Array:
    """Gathers [num_ranks * T, ...] from every rank's [T, ...].

    `num_parts`: each rank's tokens are in so many parts, and the result is in the order of (part,
    rank, token).
    """
    gathered = gather(group, x)
    if num_parts == 1:
        return gathered
    parts = gathered.reshape(group.num_ranks, num_parts, -1, *x.shape[1:])
    return jnp.swapaxes(parts, 0, 1).reshape(gathered.shape)


def own_tokens(group: GroupSpec, x: jax.Array, *, num_parts: int = 1) -> jax.Array:
    """Returns this rank's part of the result of gather_tokens."""
    parts = x.reshape(num_parts, group.num_ranks, -1, *x.shape[1:])
    own = jax.lax.dynamic_index_in_dim(parts, group.rank(), axis=1, keepdims=False)
    flat: jax.Array = own.reshape(-1, *x.shape[1:])
    return flat


def places_of_parts(index: jax.Array, size: int, *, num_ranks: int, num_parts: int) -> jax.Array:
    """Returns places in the arrays [num_parts * size] of all ranks, from source * size + place.

    Source s is part s // num_ranks of rank s % num_ranks. -1 means none.
    """
    if num_parts == 1:
        return index
    source, place = index // size, index % size
    part, rank = source // num_ranks, source % num_ranks
    return jnp.where(index >= 0, (rank * num_parts + part) * size + place, -1)


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


def to_bits(rows: jax.Array) -> jax.Array:
    """Returns floating rows as integers, in which they move.

    XLA:CPU selects fp8 through a wider type, which changes NaN bits.
    """
    if not jnp.issubdtype(rows.dtype, jnp.floating):
        return rows
    bits: jax.Array = jax.lax.bitcast_convert_type(rows, f"uint{8 * rows.dtype.itemsize}")
    return bits


def from_bits(bits: jax.Array, dtype: Any) -> jax.Array:
    """Returns rows of their dtype from the result of `to_bits`."""
    if bits.dtype == dtype:
        return bits
    rows: jax.Array = jax.lax.bitcast_convert_type(bits, dtype)
    return rows
