"""Waiting for results that may never come: those of collectives whose peers have gone."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_ep import _jax_compat
from jax_ep.errors import JaxEpError

_LOOK_S = 0.05
GRACE_S = 0.5  # what a program that goes on may take to end, and a failure to be known
# Between two looks at results: a part of what was waited for already.
_PART, _MIN_PAUSE_S, _MAX_PAUSE_S = 0.02, 20e-6, 2e-3


def settle(
    results: Any,
    *,
    failure: Callable[[], JaxEpError | None],
    loss: Callable[[], JaxEpError | None],
    timeout: float,
) -> None:
    """Until all results are there, or what keeps them from coming is known.

    A custom call ends when its group fails. The psum behind it, whose peer has gone, does not, or
    fails in words of its own.

    Args:
      results: arrays, in a pytree.
      failure: what the group has recorded, if it has failed.
      loss: that a process of the group has ended, if one has. It may end when it is done, while
        this one still computes: it is blamed for results that have failed, and for those that are
        late.
      timeout: seconds from a loss until results are late.

    Raises: what `failure` or `loss` tells; whatever JAX raises.
    """
    leaves = [leaf for leaf in jax.tree.leaves(results) if isinstance(leaf, jax.Array)]
    begin = looked = time.monotonic()
    since: dict[str, float] = {}
    # Not in block_until_ready, which cannot be called back; and a thread that is in it when the
    # interpreter ends would abort the process.
    while not all(_jax_compat.is_ready(leaf) for leaf in leaves):
        now = time.monotonic()
        time.sleep(min(max(_PART * (now - begin), _MIN_PAUSE_S), _MAX_PAUSE_S))
        if now - looked < _LOOK_S:
            continue
        looked = now
        for kind, found, patience in (("failure", failure(), GRACE_S), ("loss", loss(), timeout)):
            if found is not None and now - since.setdefault(kind, now) > patience:
                raise found
    try:
        jax.block_until_ready(leaves)
    except Exception as problem:
        deadline = time.monotonic() + GRACE_S
        while (known := failure() or loss()) is None and time.monotonic() < deadline:
            time.sleep(_LOOK_S)
        if known is None:
            raise
        raise known from problem


def drain(devices: Sequence[jax.Device], *, timeout: float) -> bool:
    """Waits until all that was launched on devices of this process has ended.

    XLA runs the programs of a device in turn, and on CPU devices those of several devices too.

    Returns: whether it has, within `timeout` seconds.
    """
    mesh = Mesh(np.array(devices), ("devices",))
    zeros = np.zeros(len(devices), np.int32)
    last = jax.jit(jnp.negative)(
        jax.device_put(zeros, NamedSharding(mesh, PartitionSpec("devices")))
    )
    deadline = time.monotonic() + timeout
    while not _jax_compat.is_ready(last):
        if time.monotonic() > deadline:
            return False
        time.sleep(_MAX_PAUSE_S)
    return True
