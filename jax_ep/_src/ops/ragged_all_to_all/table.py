"""The arrays that describe the pieces of a ragged exchange."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Table(NamedTuple):
    """What a rank knows of its pieces: arrays [K] int32, or None where they follow from others.

    Given: as in jax.lax.ragged_all_to_all. Packed: `sizes` alone, [num_ranks]. Back: offsets of
    what this rank had sent, and `sizes` of what it had received.
    """

    input_offsets: Any
    sizes: Any
    output_offsets: Any
    recv_sizes: Any


class Moved(NamedTuple):
    """The results of an exchange, or their shapes and dtypes, in the order of the handler."""

    places: Any  # [K] first row here of each received piece, by source; back: [0]
    counts: Any  # [K] rows of each that were moved; back: [0]
    send_places: Any  # packed: [num_ranks] first row of each sent piece at its destination
    recv_sizes: Any  # packed: [num_ranks] rows that each rank has sent here
    rows: tuple[Any, ...]  # [num_places, ...]


def is_written(places: jax.Array, counts: jax.Array, num_places: int) -> jax.Array:
    """Returns [num_places] bool, whether a received piece has a row for each place."""
    first = jnp.where(counts > 0, places, num_places)
    end = jnp.where(counts > 0, places + counts, num_places)
    edges = jnp.zeros((num_places + 1,), jnp.int32).at[first].add(1).at[end].add(-1)
    return jnp.cumsum(edges)[:num_places] > 0
