"""Gets groups together, and alone, which fails."""

import time

import jax
import numpy as np
from joined import echo, ids, me, mesh, num_ranks_of, x

import jax_ep
from jax_ep.testing.compare import assert_same_bits
from jax_ep.testing.ranks import on_group


def use(group):
    y = on_group(lambda x, ids: echo(group, x, ids), group)(x, ids)
    assert_same_bits(y, x * num_ranks_of(ids).astype(np.float32))


for turn in range(2):
    group = jax_ep.Group.get(mesh, "ep", timeout=20.0)
    assert group is jax_ep.Group.get(mesh, "ep")
    use(group)
    if turn == 0:
        step = jax.jit(lambda x: (jax_ep.Group.get(mesh, "ep"), x)[1])
        step(1.0)  # nothing to open
        group.close()
        jax_ep.Group.open(mesh, "ep", timeout=20.0).close()
print("closed and got again")
start = time.monotonic()
try:  # open here alone: it opens for nobody, and nobody waits for ever
    if me == 1:
        group.close()
        jax_ep.Group.get(mesh, "ep", timeout=2.0)
        raise AssertionError
    assert jax_ep.Group.get(mesh, "ep") is group
except jax_ep.GroupError as e:
    print(e)
assert time.monotonic() - start < 15.0
time.sleep(4.0 if me == 0 else 0.0)
group.close()
with jax_ep.Group.get(mesh, "ep", timeout=20.0) as group:
    print("together")
