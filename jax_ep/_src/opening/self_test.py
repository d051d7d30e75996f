"""The self-test of a new group: data moves between every pair of ranks, and is compared."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from jax_ep._src.base.errors import GroupError
from jax_ep._src.base.options import Layout
from jax_ep._src.base.spec import CallSpec
from jax_ep._src.group.group import Group
from jax_ep._src.opening import usability
from jax_ep._src.ops.pull_rows.call import pull_rows
from jax_ep._src.processes.rendezvous import Rendezvous


def run(group: Group, rendezvous: Rendezvous) -> None:
    """Pulls one number from every rank to every rank; a GroupError names the first wrong pair.

    All processes run the program, or none does. JAX numbers the launches of a program in each
    process: if the numbers differed, ranks on CPU devices could never meet again.
    """
    num_ranks = group.num_ranks
    num_sms = group.budgets.of["cached_dispatch"][Layout.RANK].sms
    is_whole = usability.is_complete(group.backends[group.backend])
    backend = group.backend if is_whole else "xla"
    spec = CallSpec(group.spec, backend, num_sms, "Group.open")

    def pull_one_each() -> jax.Array:
        rank = group.spec.rank()
        peers = jnp.arange(num_ranks, dtype=jnp.int32)
        mine = (rank * num_ranks + peers)[:, None]
        index = peers * num_ranks + rank
        return pull_rows(spec, index, mine)

    # A mesh with default axis types: the axes of the group's mesh may have any type.
    mesh = Mesh(group.mesh.devices, group.mesh.axis_names)
    partition = PartitionSpec(tuple(mesh.axis_names))
    test = jax.shard_map(
        pull_one_each, mesh=mesh, in_specs=(), out_specs=partition, check_vma=False
    )
    compiled = jax.jit(test).lower().compile()
    rendezvous.gather("compiled self-test", None)
    result = compiled()
    group.wait_for_results(result)
    for shard in result.addressable_shards:
        rank = group.spec.rank_of(shard.device.id)
        got = np.asarray(shard.data)[:, 0]
        expected = np.arange(num_ranks) * num_ranks + rank
        if not np.array_equal(got, expected):
            peer = int(np.argmax(got != expected))
            raise GroupError(
                f"Group.open: self-test of back end {backend!r} failed: rank {rank} expected "
                f"{expected[peer]} from rank {peer}, got {got[peer]}"
            )
