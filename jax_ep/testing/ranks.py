"""Running a per-rank function on stacked arrays [R, ...], as the reference has them."""

import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jax_ep


def prepare_virtual_devices(num_ranks: int = 8) -> None:
    """Sets what JAX's CPU client reads when it starts; other platforms ignore it."""
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_force_host_platform_device_count" not in flags:
        count = f"--xla_force_host_platform_device_count={num_ranks}"
        os.environ["XLA_FLAGS"] = f"{flags} {count}".strip()
    # With fewer threads, many launches in flight hang even stock collectives on few cores.
    os.environ.setdefault("PJRT_NPROC", str(max(16, 2 * num_ranks)))


def make_mesh(num_ranks: int, axis: str = "ep") -> Mesh:
    """A mesh over the first devices of the program."""
    return Mesh(np.array(jax.devices()[:num_ranks]), (axis,))


def on_ranks(
    fn: Callable[..., Any],
    mesh: Mesh,
    *,
    axes: tuple[str, ...] | None = None,
    check_vma: bool = True,
    jit: bool = True,
) -> Callable[..., Any]:
    """Makes `fn`, which sees one rank's arrays, take and give stacked ones.

    Args:
      fn: arrays to a pytree of arrays, each without the rank axis.
      mesh: where it runs.
      axes: of the mesh; flattened, they are the rank axis. None: all. Along others all is equal.
      check_vma: as in jax.shard_map.
      jit: whether to compile.

    Returns:
      The same function over arrays with a leading rank axis.
    """
    spec = PartitionSpec(tuple(mesh.axis_names) if axes is None else axes)

    def per_rank(*stacked: Any) -> Any:
        out = fn(*jax.tree.map(lambda a: a[0], stacked))
        return jax.tree.map(lambda a: a[None], out)

    mapped = jax.shard_map(per_rank, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=check_vma)
    return jax.jit(mapped) if jit else mapped


def place(arrays: Any, mesh: Mesh, axes: tuple[str, ...] | None = None) -> Any:
    """Puts a pytree of arrays [R, ...], known to every process, on the mesh, one row per rank."""
    spec = PartitionSpec(tuple(mesh.axis_names) if axes is None else axes)
    sharding = NamedSharding(mesh, spec)

    def put(array: Any) -> jax.Array:
        whole = np.asarray(array)
        return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])

    return jax.tree.map(put, arrays)


def on_group(
    fn: Callable[..., Any], group: jax_ep.Group, *, check_vma: bool = True
) -> Callable[..., Any]:
    """`on_ranks` over a group's mesh and axes, for arguments that every process has in whole."""
    mapped = on_ranks(fn, group.mesh, axes=group.axes, check_vma=check_vma)
    return lambda *arrays: mapped(*place(arrays, group.mesh, group.axes))
