"""Nodes that are hosts, then nodes that share a host. argv[2:]: names of a check for each.

Custom calls run inside the nodes. JAX's collectives run between hosts, custom calls on one host.
"""

import sys

import jax
import numpy as np
from hosts import unix_links
from jax.sharding import Mesh

import jax_ep
from jax_ep.testing import conformance
from jax_ep.testing.compare import assert_same_bits
from jax_ep.testing.ranks import on_ranks, place

devices = np.array(jax.devices())
by_name = {check.name: check for check in conformance.CHECKS}
checks = [by_name[name] for name in sys.argv[2:]]
ones = np.ones((4, 16), np.float32)

with jax_ep.Group.open(Mesh(devices, ("ep",)), "ep", ranks_per_node=2, timeout=120.0) as group:
    info = group.info()
    assert info.backend == "cpu", info
    print(info.transport)
    print(info.backends["cpu"])
    checks[0](group, "cpu")
    total = on_ranks(lambda a: jax_ep.all_reduce(a, group=group), group.mesh)
    assert_same_bits(total(*place((ones,), group.mesh)), ones * 4)
    try:
        on_ranks(lambda a: jax_ep.all_reduce(a, group=group, backend="cpu"), group.mesh)(ones)
    except jax_ep.GroupError as e:
        print(e)

unix_links.host = lambda: "one host"
mixed = Mesh(devices[[0, 2, 1, 3]], ("ep",))
for nodes in (mixed, Mesh(devices, ("ep",))):
    with jax_ep.Group.open(nodes, "ep", ranks_per_node=2, timeout=120.0) as group:
        print(group.info().transport)
        checks[1](group, "cpu")
print("passed")
