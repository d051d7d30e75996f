"""all_to_all_v: sends a different number of rows to each rank."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jax_ep._src.base import limits
from jax_ep._src.base.errors import ShapeError
from jax_ep._src.base.options import BackendName
from jax_ep._src.base.spec import CallSpec
from jax_ep._src.group.group import Group
from jax_ep._src.ops.common.checks import Checks
from jax_ep._src.ops.common.vary import vary_alike
from jax_ep._src.ops.ragged_all_to_all import vjp
from jax_ep._src.ops.ragged_all_to_all.api import call_spec, countable, metadata, moved_array

_check = Checks("all_to_all_v")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AllToAllV:
    """The rows that one rank received in an all_to_all_v. A pytree.

    Attributes:
      x: arrays [recv_capacity, ...] in the pytree of the operands; rows side by side, in the order
        of the ranks that they come from, then zeros.
      recv_sizes: [num_ranks] int32, rows that each rank has sent here, dropped rows included.
      num_dropped: [1] int32, rows that did not fit into recv_capacity on this rank.
    """

    x: Any
    recv_sizes: jax.Array
    num_dropped: jax.Array


def all_to_all_v(
    x: Any,
    send_sizes: jax.Array,
    *,
    group: Group,
    recv_capacity: int,
    num_sms: int | None = None,
    backend: BackendName | None = None,
) -> AllToAllV:
    """Sends a different number of rows to each rank; the ranks exchange the numbers themselves.

    Args:
      x: [T, ...] of any dtype of whole bytes, or a pytree of arrays with the same T: tokens, their
        ids, their weights. First come the rows for rank 0, then those for rank 1, and so on.
      send_sizes: [num_ranks] of any integer dtype, the number of rows for each rank. Negative
        numbers count as 0, and the rows end at T.
      group: the ranks.
      recv_capacity: rows that this rank can receive. The first rows in the order of the sources are
        kept, the rest is dropped and counted.
      num_sms: as in `ragged_all_to_all`.
      backend: None (the group's), "cpu", "cuda" (GPU groups) or "xla".

    Returns:
      AllToAllV. Up to 4 arrays of x travel in one launch. If no rank drops rows, `all_to_all_v` of
      results with `recv_sizes` in the place of send_sizes brings them back to where x was.

    Collective: every rank of the group calls it, inside jax.shard_map over the group's mesh.
    Gradient: of x, the cotangent of the rows that have arrived; dropped rows have zeros. Integers
      have none. Second derivatives raise ConfigError; JAX refuses forward mode.
    Batches: `jax.vmap` makes one call for each element, in order.
    Limits: T * num_ranks and recv_capacity below 2^31.
    Raises: ShapeError, DTypeError, ConfigError, GroupError while tracing; PeerTimeoutError,
      GroupError from `group.check()`.
    Source: MPI_Alltoallv (MPI, 1994), without the receiver's counts.
    """
    group = _check.group(group)
    recv_capacity = _check.integer(recv_capacity, minimum=1, name="recv_capacity")
    leaves, structure = jax.tree.flatten(x)
    if not leaves:
        raise ShapeError(f"{_check.op}: x must hold an array, got {x!r}")
    rows = tuple(moved_array(_check, leaf, name="x") for leaf in leaves)
    num_rows = rows[0].shape[0]
    for array in rows:
        if array.shape[0] != num_rows or array.size == 0:
            raise ShapeError(
                f"{_check.op}: arrays of x must be [T, ...] with the same T, and none empty, got "
                f"shapes {', '.join(str(a.shape) for a in rows)}"
            )
    countable(_check, num_rows, recv_capacity, group)
    send_sizes = metadata(_check, send_sizes, name="send_sizes")
    _check.shape(send_sizes, (group.num_ranks,), name="send_sizes")
    spec = call_spec(_check, group, num_sms, backend)
    rows, send_sizes = vary_alike((rows, _cut(send_sizes, num_rows)), group)
    calls = [
        vjp.all_to_all_v(spec, num_rows, recv_capacity, part, send_sizes)
        for part in _parts(rows, spec)
    ]
    received = jax.tree.unflatten(structure, [array for moved in calls for array in moved.rows])
    sizes, counts = calls[0].recv_sizes, calls[0].counts
    num_dropped = jnp.sum(sizes, dtype=jnp.int32) - jnp.sum(counts, dtype=jnp.int32)
    return AllToAllV(received, sizes, num_dropped[None])


def _cut(send_sizes: jax.Array, num_rows: int) -> jax.Array:
    """Returns sizes whose sum is at most `num_rows`."""
    ends = jnp.cumsum(jnp.clip(send_sizes, 0, num_rows), dtype=jnp.int32)
    return jnp.diff(jnp.minimum(ends, num_rows), prepend=jnp.zeros((1,), jnp.int32))


def _parts(rows: tuple[jax.Array, ...], spec: CallSpec) -> list[tuple[jax.Array, ...]]:
    """Returns the arrays of each call: as many as one launch takes."""
    most = limits.MAX_ROW_STREAMS
    return [rows[i : i + most] for i in range(0, len(rows), most)]
