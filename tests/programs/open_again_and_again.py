"""Opens and closes a group, argv[1] times, and measures what stays behind."""

import gc
import os
import subprocess
import sys
import time

import jax
import numpy as np
from joined import echo, ids, mesh, num_ranks_of, x

import jax_ep
from jax_ep.testing.compare import assert_same_bits
from jax_ep.testing.ranks import on_group


def held():
    gc.collect()
    fds = len(os.listdir("/proc/self/fd"))
    threads = len(os.listdir("/proc/self/task"))
    with open("/proc/self/statm") as f:
        memory = int(f.read().split()[1]) * 4096
    of_gpu = 0
    if jax.devices()[0].platform == "gpu":
        query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        of_gpu = max(map(int, subprocess.check_output(query, text=True).split()))
    return fds, threads, memory, of_gpu


def exchange():
    with jax_ep.Group.open(mesh, "ep", timeout=60.0) as group:
        y = on_group(lambda x, ids: echo(group, x, ids), group)(x, ids)
        assert_same_bits(y, x * num_ranks_of(ids).astype(np.float32))
        del y


def once():
    exchange()
    jax.clear_caches()


for _ in range(6):
    once()
before = held()
for _ in range(int(sys.argv[1])):
    once()
time.sleep(6.0)  # idle threads leave
after = held()
print("held", before, after)
assert after[0] <= before[0], "descriptors"
assert after[1] <= before[1] + 2, "threads"
assert after[2] <= before[2] + 64 * 2**20, "memory"
assert after[3] <= before[3] + 256, "MiB of a GPU"  # the other process may hold a group
assert not [name for name in os.listdir("/dev/shm") if "jax_ep" in name]
print("passed")
