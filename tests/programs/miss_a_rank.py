"""Loses a rank amid calls: argv[1] is the signal that ends process 1, or `skip`."""

import os
import signal
import sys
import time

import numpy as np
from joined import echo, ids, me, mesh, num_ranks_of, x

import jax_ep
from jax_ep.testing.ranks import on_group

group = jax_ep.Group.open(mesh, "ep", timeout=3.0)
run = on_group(lambda x, ids: echo(group, x, ids), group)
run(x, ids)
group.check()
how = sys.argv[1]
start = time.monotonic()
try:
    for i in range(10):
        if i == 5 and me == 1 and how != "skip":
            os.kill(os.getpid(), getattr(signal, how))
        if i == 5 and how == "skip":
            group._native_group.handle.skip_rank(3)
        start = time.monotonic()
        y = run(x, ids)
        group.check(y)
except jax_ep.PeerTimeoutError as e:
    print("waited", time.monotonic() - start)
    print(e)
    good = x * num_ranks_of(ids).astype(np.float32)
    for shard in y.addressable_shards:  # good, where another process was ahead by a call
        data = np.asarray(shard.data)
        assert np.isnan(data).all() or np.array_equal(data, good[shard.index])
    for shard in run(x, ids).addressable_shards:
        assert np.isnan(np.asarray(shard.data)).all()
    sys.exit(7)
