"""Exchanges within slices that cross processes, over several orders of devices."""

import jax
import numpy as np
from jax.sharding import Mesh
from joined import R, echo

import jax_ep
from jax_ep.testing.compare import assert_same_bits
from jax_ep.testing.ranks import on_ranks, place

devices = np.array(jax.devices())
orders = [devices.reshape(2, 4), devices.reshape(4, 2).T, devices[::-1].reshape(2, 4)]
for turn, order in enumerate(orders):
    wide = Mesh(order, ("dp", "ep"))
    with jax_ep.Group.open(wide, "ep", name=f"slices{turn}", timeout=30.0) as group:
        assert (group.info().num_slices, group.backend) == (2, "cpu")

        def run(x, ids):
            slice = jax.lax.axis_index("dp").astype(x.dtype)
            y = echo(group, x + 100 * slice, ids)
            return y, jax_ep.all_reduce(x + slice, group=group)

        ids4 = np.tile(np.arange(16, dtype=np.int32), (8, 1))[..., None]
        own = np.arange(8 * 16 * 64, dtype=np.float32).reshape(8, 16, 64) % 50
        y, total = on_ranks(run, wide, check_vma=False)(*place((own, ids4 % (4 * R)), wide))
        group.check(y)
        slices = np.repeat(np.arange(2, dtype=np.float32), 4)[:, None, None]
        assert_same_bits(y, own + 100 * slices)
        sums = (own + slices).reshape(2, 4, 16, 64).sum(1, keepdims=True)
        assert_same_bits(total, np.broadcast_to(sums, (2, 4, 16, 64)).reshape(8, 16, 64))
print("passed")
