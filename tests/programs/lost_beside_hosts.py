"""Kills process 1 of several hosts of argv[1] processes; its neighbours on the host notice."""

import os
import signal
import sys
import time

from hosts import make_slices, num_hosts
from joined import echo, me, x

import jax_ep
from jax_ep.testing.ranks import on_ranks, place

mesh, experts = make_slices(num_hosts)
num_ranks = mesh.shape["expert"]

group = jax_ep.Group.open(mesh, "expert", timeout=60.0)
run = on_ranks(lambda x, ids: echo(group, x, ids, num_ranks), mesh, check_vma=False)
data = place((x, experts), mesh)
group.check(run(*data))
if me == 1:
    os.kill(os.getpid(), signal.SIGKILL)
start = time.monotonic()
try:
    for _ in range(5):
        group.check(run(*data))
    print("passed")
except jax_ep.PeerTimeoutError as e:
    print("waited", time.monotonic() - start)
    print(e)
sys.stdout.flush()
os._exit(7)  # jax.distributed would wait for the killed one
