"""Takes gradients over hosts of argv[1] processes, on back end argv[2]; argv may say `shares`."""

import sys

import jax
import numpy as np
from hosts import make_slices, num_hosts
from joined import echo, num_ranks_of, x

import jax_ep
from jax_ep.testing.compare import assert_same_bits
from jax_ep.testing.ranks import on_ranks, place

mesh, experts = make_slices(num_hosts)
num_ranks = mesh.shape["expert"]
with jax_ep.Group.open(mesh, "expert", timeout=60.0) as group:
    info = group.info()
    assert (info.backend, info.num_slices) == (sys.argv[2], num_hosts), info

    def step(x, ids, scale):
        def loss(scale):
            return (echo(group, x * scale, ids, num_ranks) ** 2).sum()

        value, gradient = jax.value_and_grad(loss)(scale)
        sums = jax_ep.all_reduce(x, group=group)
        if "shares" not in sys.argv:  # NCCL takes no two ranks on a GPU
            value, gradient = jax.lax.psum((value, gradient), ("data", "expert"))
        return value[None], gradient, sums

    run = on_ranks(step, mesh, check_vma=False)
    scale = np.full((mesh.size, 1), 2.0, np.float32)
    for _ in range(3):
        value, gradient, sums = run(*place((x, experts, scale), mesh))
    counts = num_ranks_of(experts, num_ranks).astype(np.float32)
    totals = ((2 * x * counts) ** 2).sum(axis=(1, 2))[:, None]
    if "shares" not in sys.argv:
        totals = np.full_like(totals, totals.sum())
    assert_same_bits(value, totals)
    assert_same_bits(gradient, totals)
    expected = x.reshape(num_hosts, num_ranks, *x.shape[1:]).sum(1).repeat(num_ranks, axis=0)
    assert_same_bits(sums, expected)
print("passed")
