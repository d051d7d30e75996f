"""Raises in process argv[1] while the others wait for it."""

import sys

from joined import echo, ids, me, mesh, x

import jax_ep
from jax_ep.testing.ranks import on_group

with jax_ep.Group.open(mesh, "ep", timeout=3.0) as group:
    run = on_group(lambda x, ids: echo(group, x, ids), group)
    group.check(run(x, ids))
    if me == int(sys.argv[1]):
        raise ValueError("not today")
    try:
        group.check(run(x, ids))
    except jax_ep.PeerTimeoutError as e:
        print(e)
        sys.exit(7)
