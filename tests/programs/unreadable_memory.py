"""Opens a group whose process 1 cannot read the memory of process 0."""

from typing import Any

import numpy as np
from joined import echo, ids, me, mesh, num_ranks_of, x

import jax_ep
from jax_ep._src.base import native_modules
from jax_ep.testing.compare import assert_same_bits
from jax_ep.testing.ranks import on_group

native: Any = native_modules.load("cpu")
if me == 1:
    native.try_reading = lambda pid, address, expected: "not today"
with jax_ep.Group.open(mesh, "ep", timeout=60.0) as group:
    info = group.info()
    print(info.backend, info.backends["cpu"])
    y = on_group(lambda x, ids: echo(group, x, ids), group)(x, ids)
    assert_same_bits(y, x * num_ranks_of(ids).astype(np.float32))
