"""Running a per-rank function on stacked arrays [R, ...], as the reference has them."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec


def make_mesh(num_ranks: int, axis: str = "ep") -> Mesh:
    """A mesh over the first devices of the process."""
    return Mesh(np.array(jax.devices()[:num_ranks]), (axis,))


def on_ranks(
    fn: Callable[..., Any], mesh: Mesh, *, check_vma: bool = True, jit: bool = True
) -> Callable[..., Any]:
    """Makes `fn`, which sees one rank's arrays, take and give stacked ones.

    Args:
      fn: arrays to a pytree of arrays, each without the rank axis.
      mesh: its axes, flattened, are the rank axis.
      check_vma: as in jax.shard_map.
      jit: whether to compile.

    Returns:
      The same function over arrays with a leading rank axis.
    """
    spec = PartitionSpec(tuple(mesh.axis_names))

    def per_rank(*stacked: Any) -> Any:
        out = fn(*jax.tree.map(lambda a: a[0], stacked))
        return jax.tree.map(lambda a: a[None], out)

    mapped = jax.shard_map(per_rank, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=check_vma)
    return jax.jit(mapped) if jit else mapped
