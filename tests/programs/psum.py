"""Adds up over two processes, and compares with a right and a wrong sum."""

import jax
import numpy as np

from jax_ep.testing import launch
from jax_ep.testing.compare import assert_same_bits, shards
from jax_ep.testing.ranks import make_mesh, on_ranks, place

launch.initialize()
assert (jax.process_count(), len(jax.local_devices())) == (2, 2)
mesh = make_mesh(4)
x = np.arange(12, dtype=np.float32).reshape(4, 3)
total = on_ranks(lambda x: jax.lax.psum(x, "ep"), mesh, check_vma=False)(place(x, mesh))
assert len(list(shards(total))) == 2
assert_same_bits(total, np.tile(x.sum(0), (4, 1)))
try:
    assert_same_bits(total, np.where(np.arange(4)[:, None] == 3, 0, x.sum(0)).astype(np.float32))
except AssertionError as error:
    print("process", jax.process_index(), "saw", error)
print("process", jax.process_index(), "is done")
