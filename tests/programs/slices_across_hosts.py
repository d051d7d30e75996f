"""Exchanges within slices that span hosts of argv[1] processes."""

import numpy as np
from hosts import make_slices, num_hosts
from jax.sharding import Mesh
from joined import echo, num_ranks_of, x

import jax_ep
from jax_ep.testing.compare import assert_same_bits
from jax_ep.testing.ranks import on_ranks, place

inside, experts = make_slices(num_hosts)
mesh = Mesh(inside.devices.T, inside.axis_names)
num_ranks = num_hosts
experts = experts % (4 * num_ranks)
with jax_ep.Group.open(mesh, "expert", timeout=150.0) as group:
    info = group.info()
    assert info.backend == "xla", info
    print(info.backends["cpu"])
    run = on_ranks(lambda x, ids: echo(group, x, ids, num_ranks), mesh, check_vma=False)
    data = place((x, experts), mesh)
    assert_same_bits(run(*data), x * num_ranks_of(experts, num_ranks).astype(np.float32))
try:
    jax_ep.Group.open(mesh, "expert", backend="cpu", timeout=60.0)
except jax_ep.GroupError as e:
    print(e)
