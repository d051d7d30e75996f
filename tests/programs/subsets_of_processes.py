"""Opens groups over halves of the processes."""

import jax
import numpy as np
from jax.sharding import Mesh
from joined import echo, ids, me, num_ranks_of, x

import jax_ep
from jax_ep.testing.compare import assert_same_bits
from jax_ep.testing.ranks import on_group


def run_on(part):
    num_ranks = part.size
    with (
        jax_ep.Group.open(part, "ep", name="a", timeout=60.0) as a,
        jax_ep.Group.open(part, "ep", name="b", timeout=60.0) as b,
    ):

        def echoes(x, ids):
            return echo(a, x, ids, num_ranks) + 10 * echo(b, x, ids, num_ranks)

        own, own_ids = x[:num_ranks], ids[:num_ranks] % (4 * num_ranks)
        y = on_group(echoes, a)(own, own_ids)
        assert_same_bits(y, 11 * own * num_ranks_of(own_ids, num_ranks).astype(np.float32))


devices = jax.devices()
for first in range(0, len(devices), 4):
    part = Mesh(np.array(devices[first : first + 4]), ("ep",))
    mine = {d.process_index for d in part.devices.flat}
    if me not in mine:
        try:
            jax_ep.Group.open(part, "ep", name="a", timeout=60.0)
        except jax_ep.GroupError as e:
            assert f"process {me} has no device of the mesh" in str(e)
            print("refused", sorted(mine))
        continue
    run_on(part)
    print("passed", sorted(mine))
