"""Runs a compiled function with groups that are opened again after a process came late."""

import time

import numpy as np
from joined import echo, ids, me, mesh, num_ranks_of, x

import jax_ep
from jax_ep.testing.compare import assert_same_bits
from jax_ep.testing.ranks import on_group

group = jax_ep.Group.open(mesh, "ep", timeout=5.0)
run = on_group(lambda x, ids: echo(group, x, ids), group)
assert group.backend != "xla", group.info()
good = x * num_ranks_of(ids).astype(np.float32)
assert_same_bits(run(x, ids), good)
for turn in range(2):
    if me == turn:
        time.sleep(10)  # late, not lost
    y = run(x, ids)
    try:
        group.check(y)
        raise AssertionError("nothing was told")
    except jax_ep.PeerTimeoutError as e:
        print(e)
    in_flight = [run(x, ids) for _ in range(3 * me)]
    if me != turn:
        time.sleep(5)  # to open it together
    group.close()
    group = jax_ep.Group.open(mesh, "ep", timeout=30.0 if turn else 5.0)
    for _ in range(3):
        y = run(x, ids)
        group.check(y)
        assert_same_bits(y, good)
print("passed")
