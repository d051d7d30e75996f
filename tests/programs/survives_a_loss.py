"""Loses process 1 in a group that survives it; process 0 checks, closes, and ends at once."""

import os
import signal
import time

from joined import echo, ids, me, mesh, x

import jax_ep
from jax_ep.testing.ranks import on_group

group = jax_ep.Group.open(mesh, "ep", timeout=3.0, survives=True)
run = on_group(lambda x, ids: echo(group, x, ids), group)
group.check(run(x, ids))
if me == 1:
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(0.5)
group.check()
group.close()
print("passed")
