"""Mixes many independent calls with psums."""

import jax
import numpy as np
from joined import R, echo, ids, mesh, num_ranks_of, x

import jax_ep
from jax_ep.testing.compare import assert_same_bits
from jax_ep.testing.ranks import on_group

with jax_ep.Group.open(mesh, "ep", timeout=60.0) as group:

    @jax.jit
    def layer(x, ids):
        return echo(group, x, ids)

    def fn(x, ids):
        calls = [layer(x * (i + 1), (ids + i) % (4 * R)) for i in range(64)]
        sums = [jax.lax.psum(x * (i + 1), "ep") for i in range(64)]
        last = jax.lax.scan(lambda x, _: (layer(x, ids) * 0 + x + 1, None), x, length=30)[0]
        return calls, sums, last

    run = on_group(fn, group)
    for _ in range(3):
        calls, sums, last = run(x, ids)
        for i, (y, s) in enumerate(zip(calls, sums, strict=True)):
            assert_same_bits(y, x * (i + 1) * num_ranks_of((ids + i) % (4 * R)).astype(np.float32))
            assert_same_bits(s, np.tile(x.sum(axis=0) * (i + 1), (R, 1, 1)))
        assert_same_bits(last, x + 30)
print("passed")
