"""Lets process 1 come late to calls and psums."""

import sys
import time

import jax
from joined import echo, ids, me, mesh, x

import jax_ep
from jax_ep.testing.ranks import on_group

group = jax_ep.Group.open(mesh, "ep", timeout=1.0)


def step(x, ids):
    y = echo(group, x, ids)
    return y + jax.lax.psum(y, "ep")


run = on_group(step, group)
group.check(run(x, ids))
if me == 1:
    time.sleep(4)
start = time.monotonic()
try:
    with group:
        y = run(x, ids)
except jax_ep.PeerTimeoutError as e:
    print("waited", time.monotonic() - start)
    print(e)
    sys.exit(7)
