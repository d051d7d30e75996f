"""Interrupts a sleep while a call has yet to wait.

The interpreter's exit would wait for a call that did not wait yet when the signal came. The nap is
longer than an exit takes on a busy machine: Python aborts a process whose callback ends during the
exit.
"""

import threading
import time

import jax
from interruptible import ids, interrupt, make_echo, mesh, open_group, x

from jax_ep.testing.ranks import on_ranks

group, _ = open_group()
is_sleepy = threading.Event()
with group:

    def late(x, ids):
        def nap(x):
            time.sleep(60.0 if is_sleepy.is_set() else 0.0)
            return x

        return make_echo(group)(jax.pure_callback(nap, jax.typeof(x), x), ids)

    run = on_ranks(late, mesh)
    group.check(run(x, ids))
    is_sleepy.set()
    group._native_group.handle.skip_rank(1)
    y = run(x, ids)
    interrupt(0.0)
    time.sleep(60)
