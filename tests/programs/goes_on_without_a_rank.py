"""Loses process 1 by signal argv[1] amid steps with a mask: the others go on, and name it."""

import os
import signal
import sys
import threading
import time

import jax
import numpy as np
from joined import R, ids, me, mesh, x

import jax_ep
from jax_ep.testing.ranks import on_group

LOST, AT = 1, 5
group = jax_ep.Group.open(mesh, "ep", timeout=2.0, survives=True)


def step(x, ids, mask):
    """Sends rows to 4 experts a rank, and adds up what comes back from those that answer."""
    out = jax_ep.low_latency_dispatch(
        x,
        ids,
        group=group,
        num_experts=4 * R,
        max_tokens_per_rank=x.shape[0],
        layout="rank",
        rank_mask=mask,
    )
    return jax_ep.low_latency_combine(out.x, out.handle, return_rank_mask=True)


run = on_group(step, group)
is_sent = (ids[..., None] // 4 == np.arange(R)).any(axis=-2)
mask = np.ones(R, bool)
for i in range(4 * AT):
    if i == AT and sys.argv[1] == "SIGKILL" and me == LOST:
        os.kill(os.getpid(), signal.SIGKILL)
    if i == AT and sys.argv[1] == "SIGINT":  # while it waits for the others in its dispatch
        if me == LOST:
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        else:
            time.sleep(1.0)
    living = np.arange(R) != LOST if i >= AT else np.ones(R, bool)
    start = time.monotonic()
    y, after = run(x, ids, np.tile(mask, (R, 1)))
    group.check(y, after)
    waited = time.monotonic() - start
    if i == AT:
        print("waited", waited)
    else:
        assert i == 0 or waited < 1.0, (i, waited)
    expected = x * (is_sent & living).sum(axis=-1, keepdims=True).astype(np.float32)
    for shard in y.addressable_shards:
        np.testing.assert_array_equal(shard.data, expected[shard.index])
    for shard in after.addressable_shards:
        mask = np.asarray(shard.data).reshape(-1)
        np.testing.assert_array_equal(mask, living)
assert group.info().left_out == (LOST,)
group.check()
group.close()
print("passed")
assert jax.process_count() == R
