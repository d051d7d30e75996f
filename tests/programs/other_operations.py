"""Calls another operation in each process."""

import sys

from joined import echo, ids, me, mesh, x

import jax_ep
from jax_ep.testing.ranks import on_group

group = jax_ep.Group.open(mesh, "ep", timeout=2.0)
programs = [
    lambda x, ids: echo(group, x, ids),
    lambda x, ids: jax_ep.all_reduce(x, group=group),
]
try:
    group.check(on_group(programs[me], group)(x, ids))
except jax_ep.PeerTimeoutError as e:
    print(e)
    sys.exit(7)
