"""Kills process 1 beside psums between processes that share no slice, without a `with` block."""

import os
import signal
import sys
import time

import jax
import numpy as np
from jax.sharding import Mesh
from joined import echo, ids, me, x

import jax_ep
from jax_ep.testing.ranks import on_ranks, place

mesh = Mesh(np.array(jax.devices()).reshape(2, -1), ("data", "expert"))
num_ranks = mesh.shape["expert"]
group = jax_ep.Group.open(mesh, "expert", timeout=3.0)
run = on_ranks(
    lambda x, ids: jax.lax.psum(echo(group, x, ids, num_ranks), "data"), mesh, check_vma=False
)
data = place((x, ids % (4 * num_ranks)), mesh)
group.check(run(*data))
if me == 1:
    print("killed", time.time(), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
try:
    while True:
        group.check(run(*data))
except jax_ep.PeerTimeoutError as e:
    print("raised", time.time())
    print(e)
    sys.exit(7)
