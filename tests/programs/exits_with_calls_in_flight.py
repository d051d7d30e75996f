"""Ends with an open group and calls in flight."""

import numpy as np

import jax_ep
from jax_ep.testing.ranks import make_mesh, on_ranks, virtual_devices

virtual_devices(4)
group = jax_ep.Group.open(make_mesh(4), "ep")


def fn(x, ids):
    out = jax_ep.dispatch(x, ids, group=group, num_experts=4)
    return jax_ep.combine(out.x, out.handle)


step = on_ranks(fn, group.mesh)
x, ids = np.ones((4, 64, 512), np.float32), np.zeros((4, 64, 1), np.int32)
ys = [step(x, ids) for _ in range(20)]
print("end of script")
