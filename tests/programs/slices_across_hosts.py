"""Exchanges within slices that span hosts of argv[1] processes; tells the nodes of groups."""

import numpy as np
from hosts import make_slices, num_hosts
from jax.sharding import Mesh
from joined import R, echo, ids, me, num_ranks_of, x

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
    assert info.ranks_per_node == num_hosts, info
    assert info.ranks_per_node_from.startswith("each host has one rank of a slice"), info
    print(info.backends["cpu"])
    run = on_ranks(lambda x, ids: echo(group, x, ids, num_ranks), mesh, check_vma=False)
    data = place((x, experts), mesh)
    assert_same_bits(run(*data), x * num_ranks_of(experts, num_ranks).astype(np.float32))
try:
    jax_ep.Group.open(mesh, "expert", backend="cpu", timeout=60.0)
except jax_ep.GroupError as e:
    print(e)

# Slices inside the hosts, and one slice of all ranks, host by host and in turns.
in_turns = inside.devices.T.reshape(1, -1)
for devices, expected, why in (
    (inside.devices, R // num_hosts, "each slice is on one host"),
    (inside.devices.reshape(1, -1), R // num_hosts, "the ranks of each host"),
    (in_turns, R, "the ranks of a host are not consecutive"),
):
    mesh = Mesh(devices, inside.axis_names)
    with jax_ep.Group.open(mesh, "expert", backend="xla", timeout=60.0) as group:
        info = group.info()
        assert info.ranks_per_node == group.ranks_per_node == expected, info
        assert info.ranks_per_node_from.startswith(why), info
mesh = Mesh(inside.devices.reshape(1, -1), inside.axis_names)
with jax_ep.Group.open(mesh, "expert", name="two levels", timeout=60.0) as group:
    info = group.info()
    assert (info.backend, info.ranks_per_node) == ("cpu", R // num_hosts), info
    assert info.transport.startswith("xla: JAX's collectives (a slice of the mesh spans"), info
    assert info.transport.endswith("inside the nodes back end 'cpu'"), info
    run = on_ranks(lambda x, ids: echo(group, x, ids), mesh, check_vma=False)
    data = place((x, ids), mesh)
    assert_same_bits(run(*data), x * num_ranks_of(ids).astype(np.float32))
with jax_ep.Group.open(mesh, "expert", backend="xla", timeout=60.0, ranks_per_node=R) as group:
    info = group.info()
    assert (info.ranks_per_node, info.ranks_per_node_from) == (R, "the argument of Group.open"), (
        info
    )
try:
    own = {"ranks_per_node": R} if me == 0 else {}
    jax_ep.Group.open(mesh, "expert", backend="xla", timeout=60.0, **own)
except jax_ep.GroupError as e:
    print(e)
print("passed")
