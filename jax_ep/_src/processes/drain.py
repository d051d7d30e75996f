"""Waiting for the end of what was launched, where its results may be held by nobody."""

import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_ep._src.base import jax_compat

_PAUSE_S = 2e-3


def drain(devices: Sequence[jax.Device], *, timeout: float) -> bool:
    """Waits until all that was launched on devices of this process has ended.

    XLA runs the programs of a device in turn, and on CPU devices those of several devices too.

    Returns: whether it has, within `timeout` seconds.
    """
    mesh = Mesh(np.array(devices), ("devices",))
    zeros = np.zeros(len(devices), np.int32)
    sharded = jax.device_put(zeros, NamedSharding(mesh, PartitionSpec("devices")))
    last = jax.jit(jnp.negative)(sharded)
    deadline = time.monotonic() + timeout
    while not jax_compat.is_ready(last):
        if time.monotonic() > deadline:
            return False
        time.sleep(_PAUSE_S)
    return True
