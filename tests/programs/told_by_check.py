"""Loses all ranks but 1 in its last call, and lets the others learn it from `check`."""

import time

from joined import echo, ids, me, mesh, x

import jax_ep
from jax_ep.testing.ranks import on_group

group = jax_ep.Group.open(mesh, "ep", timeout=2.0)
run = on_group(lambda x, ids: echo(group, x, ids), group)
group.check(run(x, ids))
start = time.monotonic()
try:
    if me == 1:
        group.check(run(x, ids))
    while me != 1 and time.monotonic() < start + 30:
        group.check()
        time.sleep(0.1)
except jax_ep.PeerTimeoutError as e:
    print(e)
