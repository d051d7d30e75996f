"""Forks children that use the group in several ways, and end."""

import gc
import os
import sys
import time
import warnings

import jax
import numpy as np
from joined import echo, ids, mesh, num_ranks_of, x

import jax_ep
from jax_ep.testing.compare import assert_same_bits
from jax_ep.testing.ranks import on_group

warnings.filterwarnings("ignore", "os.fork", RuntimeWarning)


def in_child(group, run, how):
    for use in (group.check, lambda: on_group(lambda x, ids: echo(group, x, ids), group)(x, ids)):
        try:
            use()
            os._exit(3)
        except jax_ep.GroupError as e:
            assert f"its forked child {os.getpid()} cannot use it" in str(e), e
    if how == "raises":
        raise ValueError("in a child")
    if how == "frees":
        group.close()
        del group, run
        jax.clear_caches()
        gc.collect()
    if how == "exits":
        sys.exit(5)


with jax_ep.Group.open(mesh, "ep", timeout=60.0) as group:
    run = on_group(lambda x, ids: echo(group, x, ids), group)
    expected = x * num_ranks_of(ids).astype(np.float32)
    for how in ("leaves", "raises", "frees", "exits") * 3:
        y = run(x, ids)  # children are forked while it runs
        child = os.fork()
        if child == 0:
            try:
                with group:
                    in_child(group, run, how)
            except ValueError:
                pass
            os._exit(5)
        deadline = time.monotonic() + 20.0
        while (ended := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert ended[0] == child, f"the child that {how} waits"
        assert os.waitstatus_to_exitcode(ended[1]) == 5, (how, ended)
        group.check(y)
        assert_same_bits(y, expected)
        assert_same_bits(run(x, ids), expected)
print("passed")
