"""Kills process 1 within a compiled loop of argv's `calls` and `psums`."""

import os
import signal
import sys
import threading
import time

import jax
from joined import R, echo, ids, me, mesh, x

import jax_ep
from jax_ep.testing.ranks import on_group

group = jax_ep.Group.open(mesh, "ep", timeout=3.0)


def step(x, ids):
    if "calls" in sys.argv:
        x = echo(group, x, ids) / R
    return x + 0 * jax.lax.psum(x, "ep") if "psums" in sys.argv else x


# A launch that fills a GPU's queue waits for the GPU: behind a psum whose peer has gone, for ever.
length = 50 if "psums" in sys.argv and jax.devices()[0].platform == "gpu" else 500


def steps(x, ids):
    return jax.lax.scan(lambda x, _: (step(x, ids), None), x, length=length)[0]


def kill():
    print("killed", time.time(), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


run = on_group(steps, group)
group.check(run(x, ids))
if me == 1:
    threading.Timer(0.3, kill).start()
try:
    while True:
        y = run(x, ids)
        group.check(y)
except jax_ep.PeerTimeoutError as e:
    print("raised", time.time())
    print(e)
    sys.exit(7)
