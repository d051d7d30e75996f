"""Counts the CUDA contexts of a process before and after it opens a group."""

import ctypes

import jax.numpy as jnp
from joined import echo, ids, mesh, x

import jax_ep
from jax_ep.testing import launch
from jax_ep.testing.ranks import on_group

cuda = ctypes.CDLL("libcuda.so.1")


def contexts():
    active, flags = ctypes.c_int(), ctypes.c_uint()
    found = []
    for device in range(launch.count_gpus()):
        cuda.cuDevicePrimaryCtxGetState(device, ctypes.byref(flags), ctypes.byref(active))
        found.append(active.value)
    return found


jnp.ones(3).block_until_ready()
before = contexts()
with jax_ep.Group.open(mesh, "ep", timeout=20.0) as group:
    assert group.backend == "cuda", group.info()
    group.check(on_group(lambda x, ids: echo(group, x, ids), group)(x, ids))
assert contexts() == before, (before, contexts())
print("passed")
