"""Dispatches rows that are constants of the program."""

import jax.numpy as jnp
import numpy as np
from joined import R, mesh

import jax_ep
from jax_ep.testing.compare import assert_same_bits
from jax_ep.testing.ranks import on_group

with jax_ep.Group.open(mesh, "ep", timeout=20.0) as group:
    rows = np.arange(4 * 64, dtype=np.float32).reshape(4, 64)

    def run(ids):
        out = jax_ep.dispatch(jnp.asarray(rows), ids, group=group, num_experts=R)
        return jax_ep.combine(out.x, out.handle)

    y = on_group(run, group)(np.zeros((R, 4, 1), np.int32) + np.arange(R)[:, None, None][::-1])
    group.check(y)
    assert_same_bits(y, np.tile(rows, (R, 1, 1)))
print("passed")
