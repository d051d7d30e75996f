"""Raises in process 0 of hosts of argv[1] processes, while process 1 goes on."""

import sys
import time

from hosts import make_slices
from joined import echo, me, x

import jax_ep
from jax_ep.testing.ranks import on_ranks, place

mesh, experts = make_slices(2)
num_ranks = mesh.shape["expert"]

with jax_ep.Group.open(mesh, "expert", timeout=60.0) as group:
    run = on_ranks(lambda x, ids: echo(group, x, ids, num_ranks), mesh, check_vma=False)
    group.check(run(*place((x, experts), mesh)))
    if me == 0:
        raise ValueError("not today")
    time.sleep(2.5)
    sys.exit(7)
