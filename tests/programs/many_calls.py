"""Runs thousands of calls with other routings, and counts wrong values."""

import jax
import jax.numpy as jnp
import numpy as np
from joined import R, mesh

import jax_ep
from jax_ep.testing.compare import assert_same_bits
from jax_ep.testing.ranks import on_group

with jax_ep.Group.open(mesh, "ep", timeout=60.0) as group:

    def run(x, seeds):
        def step(carry, key):
            x, num_wrong = carry
            ids = jax.random.randint(key, (x.shape[0], 4), -1, 4 * R)
            out = jax_ep.dispatch(x, ids, group=group, num_experts=4 * R)
            y = jax_ep.combine(out.x, out.handle)
            ranks = jnp.where(ids >= 0, ids // 4, -1)
            times = sum(jnp.any(ranks == r, axis=1) for r in range(R))
            num_wrong += jnp.sum(y != x * jnp.expand_dims(times, 1).astype(x.dtype))
            return ((x + 1) % 64, num_wrong), None

        zero = jax.lax.pcast(jnp.int32(0), "ep", to="varying")
        keys = jax.random.split(jax.random.key(seeds[0]), 2000)
        return jax.lax.scan(step, (x, zero), keys)[0][1][None]

    x = np.arange(R * 32 * 128, dtype=np.float32).reshape(R, 32, 128) % 61
    num_wrong = on_group(run, group)(x, np.arange(R)[:, None])
    group.check(num_wrong)
    assert_same_bits(num_wrong, np.zeros((R, 1), np.int32))
print("passed")
