"""Stops process argv[2] of hosts of argv[1] processes; the other one gives up and kills it."""

import os
import signal
import subprocess
import sys
import time

import jax
from hosts import make_slices
from joined import me, x

import jax_ep
from jax_ep._src.base import jax_compat
from jax_ep.testing.ranks import on_ranks, place

STOPPED, TIMEOUT = int(sys.argv[2]), 2.0
client = jax_compat.distributed_client()
client.key_value_set(f"pid/{me}", str(os.getpid()))
stopped_pid = int(client.blocking_key_value_get(f"pid/{STOPPED}", 60_000))

mesh, _ = make_slices(1)
run = on_ranks(lambda x: jax.lax.psum(x, mesh.axis_names), mesh, check_vma=False)
begin = time.monotonic()
try:
    with jax_ep.Group.open(
        mesh, "expert", timeout=TIMEOUT, backend="xla", ranks_per_node=4
    ) as group:
        data = place((x,), mesh)
        group.check(run(*data))
        if me != STOPPED:
            time.sleep(1.5 * TIMEOUT)  # the other one waits: who computes is not silent
        group.check(run(*data))
        begin = time.monotonic()
        if me == STOPPED:
            os.kill(os.getpid(), signal.SIGSTOP)
        while True:
            group.check(run(*data))
except jax_ep.PeerTimeoutError as e:
    print("waited", time.monotonic() - begin)
    print(e)
    print("peer", jax.devices()[e.peer].process_index)
    sys.stdout.flush()
    # Process 1 leaves first, since the end of process 0 would abort it.
    pause = 0 if STOPPED else 8
    words = ["sh", "-c", f"sleep {pause}; kill -KILL {stopped_pid}"]
    subprocess.Popen(words, start_new_session=True)
    sys.exit(7)
