"""Waits for the end of launched programs, even if nobody holds their results."""

import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_ep._src.base import jax_compat

_PAUSE_S = 2e-3


def drain(devices: Sequence[jax.Device], *, timeout: float) -> bool:
    """Waits until all programs launched on devices of this process have ended.

    XLA runs the programs of one device in turn. On CPU devices it also runs programs of several
    devices in turn.

    Returns: whether all programs have ended within `timeout` seconds.
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
