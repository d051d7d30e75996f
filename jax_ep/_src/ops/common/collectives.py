"""JAX's collectives over the ranks of a slice; a slice may be a part of a group that is cut."""

import jax

from jax_ep._src.base.group_spec import GroupSpec


def gather(group: GroupSpec, x: jax.Array) -> jax.Array:
    """Returns [num_ranks * n, ...], the arrays [n, ...] of all ranks side by side."""
    gathered: jax.Array = jax.lax.all_gather(
        x, group.axes, axis_index_groups=group.index_groups(), tiled=True
    )
    return gathered


def swap(group: GroupSpec, x: jax.Array) -> jax.Array:
    """Returns [num_ranks, ...], what each rank has for this one in its [num_ranks, ...]."""
    moved: jax.Array = jax.lax.all_to_all(
        x, group.axes, split_axis=0, concat_axis=0, axis_index_groups=group.index_groups()
    )
    return moved
