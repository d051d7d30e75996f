"""Interrupts a forked child while a call of the parent waits for its last rank."""

import os
import signal
import time

import jax
import numpy as np
from interruptible import ids, make_echo, mesh, open_group, x

from jax_ep.testing.ranks import on_ranks

group, _ = open_group()
with group:

    def late(x, ids):
        def nap(x, rank):
            time.sleep(3.0 if rank == 1 else 0.0)
            return x

        rank = jax.lax.axis_index("ep")
        return make_echo(group)(jax.pure_callback(nap, jax.typeof(x), x, rank), ids)

    y = on_ranks(late, mesh)(x, ids)
    child = os.fork()
    if child == 0:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            time.sleep(1.0)
            os._exit(3)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
    np.testing.assert_array_equal(y, x)
print("passed")
