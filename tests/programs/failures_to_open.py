"""Fails in process 1 at each stage of an opening, and opens again."""

import gc
import os
import time

import jax
import numpy as np
from joined import echo, ids, me, mesh, num_ranks_of, x

import jax_ep
from jax_ep._src.base import jax_compat, tables
from jax_ep._src.opening import open as open_body
from jax_ep._src.opening import self_test, usability
from jax_ep._src.processes import native_group
from jax_ep.testing.compare import assert_same_bits
from jax_ep.testing.ranks import on_group


def descriptors(most):
    for _ in range(100):  # threads of the native groups close theirs
        gc.collect()
        jax.clear_caches()
        found = len(os.listdir("/proc/self/fd"))
        if found <= most:
            break
        time.sleep(0.05)
    return found


def use():
    with jax_ep.Group.open(mesh, "ep", timeout=30.0) as group:
        assert group.backend == "cpu", group.info()
        y = on_group(lambda x, ids: echo(group, x, ids), group)(x, ids)
        assert_same_bits(y, x * num_ranks_of(ids).astype(np.float32))


def fails(*args, **kwargs):
    raise MemoryError("no room")


def fails_after(fn):
    def do(*args, **kwargs):
        fn(*args, **kwargs)
        fails()

    return do


STAGES = {
    "tuning": (tables, "load", fails),
    "back ends": (usability, "resolve", fails),
    "opening": (native_group.NativeOpening, "open_cpu", fails),
    "native": (native_group.NativeOpening, "_open", fails),
    "opened": (open_body, "open_native", fails_after(open_body.open_native)),
    "self-test": (self_test, "run", fails_after(self_test.run)),
}
use()
use()
before = descriptors(0)
for stage, (place, name, failing) in STAGES.items():
    original = getattr(place, name)
    if me == 1:
        setattr(place, name, failing)
    start = time.monotonic()
    try:
        jax_ep.Group.open(mesh, "ep", timeout=30.0)
        raise AssertionError(stage)
    except MemoryError:
        assert me == 1
    except jax_ep.GroupError as e:
        assert me != 1 and str(e) == "Group.open: process 1 failed: no room", e
    assert time.monotonic() - start < 10.0, stage
    setattr(place, name, original)
    use()  # at once, whatever the others have read by now
    assert descriptors(before) <= before, stage
    print("told of", stage)
listed = jax_compat.distributed_client().key_value_dir_get("jax_ep")
assert len(listed) == jax.process_count(), listed
assert not [name for name in os.listdir("/dev/shm") if "jax_ep" in name]
print("passed")
