"""Runs a per-rank function on stacked arrays [R, ...], the form of the reference."""

import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jax_ep
from jax_ep._src.base import jax_compat
from jax_ep._src.base.checks import StaticChecks
from jax_ep._src.base.config import virtual_devices_environment, xla_flag
from jax_ep._src.base.errors import ConfigError

_COUNT_FLAG = "--xla_force_host_platform_device_count"


def virtual_devices(num_devices: int = 8) -> None:
    """Makes JAX's CPU client start with several devices, and with a thread to wait for each.

    Call it after `import jax`, before JAX makes its backend: at the first `jax.devices()`, array or
    compiled function. A number from `JAX_NUM_CPU_DEVICES` or `XLA_FLAGS` is kept. GPUs stay as they
    are, so programs may call it on every platform. Not collective.

    Args:
      num_devices: number of CPU devices.

    Raises: ConfigError if JAX has already made its backend, with fewer CPU devices.
    """
    check = StaticChecks("virtual_devices")
    num_devices = check.integer(num_devices, minimum=1, name="num_devices")
    if not jax_compat.has_backends():
        if jax.config.jax_num_cpu_devices < 0 and xla_flag(_COUNT_FLAG) is None:
            jax.config.update("jax_num_cpu_devices", num_devices)
        # JAX has an option for the devices, but only an environment variable for the threads.
        threads = virtual_devices_environment(num_devices)["PJRT_NPROC"]
        os.environ.setdefault("PJRT_NPROC", threads)
    elif jax.default_backend() == "cpu" and jax.local_device_count() < num_devices:
        raise ConfigError(
            f"virtual_devices: num_devices={num_devices} comes too late, JAX has made its backend, "
            f"with {jax.local_device_count()}: call virtual_devices before the first "
            "jax.devices(), array or compiled function"
        )


def make_mesh(num_ranks: int, axis: str = "ep") -> Mesh:
    """Returns a mesh over the first devices of the program."""
    return Mesh(np.array(jax.devices()[:num_ranks]), (axis,))


def on_ranks(
    fn: Callable[..., Any],
    mesh: Mesh,
    *,
    axes: tuple[str, ...] | None = None,
    check_vma: bool = True,
    jit: bool = True,
) -> Any:
    """Makes a function of stacked arrays from `fn`, a function of one rank's arrays.

    Args:
      fn: function from arrays to a pytree of arrays, each without the rank axis.
      mesh: the mesh on which the function runs.
      axes: axes of the mesh that are the rank axis when flattened; None: all axes. Arrays are equal
        along the other axes.
      check_vma: as in jax.shard_map.
      jit: whether to compile the function.

    Returns:
      `fn` for arrays with a leading rank axis; a compiled function has `lower`.
    """
    spec = PartitionSpec(tuple(mesh.axis_names) if axes is None else axes)

    def per_rank(*stacked: Any) -> Any:
        out = fn(*jax.tree.map(lambda a: a[0], stacked))
        return jax.tree.map(lambda a: a[None], out)

    mapped = jax.shard_map(per_rank, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=check_vma)
    return jax.jit(mapped) if jit else mapped


def place(arrays: Any, mesh: Mesh, axes: tuple[str, ...] | None = None) -> Any:
    """Places a pytree of arrays [R, ...] on the mesh, one row per rank.

    Every process passes the whole arrays.
    """
    spec = PartitionSpec(tuple(mesh.axis_names) if axes is None else axes)
    sharding = NamedSharding(mesh, spec)

    def put(array: Any) -> jax.Array:
        whole = np.asarray(array)
        return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])

    return jax.tree.map(put, arrays)


def on_group(
    fn: Callable[..., Any], group: jax_ep.Group, *, check_vma: bool = True
) -> Callable[..., Any]:
    """Applies `on_ranks` over a group's mesh and axes; every process passes the whole arrays."""
    mapped = on_ranks(fn, group.mesh, axes=group.axes, check_vma=check_vma)
    return lambda *arrays: mapped(*place(arrays, group.mesh, group.axes))
