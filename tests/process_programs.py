"""Programs for several processes, on CPU devices and on GPUs."""

import re

from jax_ep.testing import launch


def number_behind(word, output):
    """Returns the number that a program printed after a word, at the end of a line."""
    found = re.search(rf"{word} ([\d.]+)\n", output)
    assert found is not None, output
    return float(found[1])


START = """
import gc, os, signal, subprocess, sys, threading, time
from jax_ep.testing import launch
launch.initialize()
import jax, jax_ep
import jax.numpy as jnp
import numpy as np
from jax_ep.testing import conformance
from jax_ep.testing.compare import assert_same_bits
from jax_ep.testing.ranks import make_mesh, on_group
mesh = make_mesh(len(jax.devices()))
me = jax.process_index()
R = mesh.devices.size

def echo(group, x, ids):
    out = jax_ep.dispatch(x, ids, group=group, num_experts=4 * R)
    return jax_ep.combine(out.x, out.handle)

def num_ranks_of(ids):
    return (ids[..., None] // 4 == np.arange(R)).any(axis=-2).sum(axis=-1, keepdims=True)

rng = np.random.default_rng(0)
x = rng.integers(-8, 9, (R, 16, 64)).astype(np.float32)
ids = rng.integers(0, 4 * R, (R, 16, 3)).astype(np.int32)
"""

REOPEN = """
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

def once(i):
    with jax_ep.Group.open(mesh, "ep", timeout=60.0) as group:
        y = on_group(lambda x, ids: echo(group, x, ids), group)(x, ids)
        assert_same_bits(y, x * num_ranks_of(ids).astype(np.float32))
        del y
    del group
    jax.clear_caches()

for i in range(6):
    once(i)
before = held()
for i in range(int(sys.argv[1])):
    once(i)
time.sleep(6.0)  # idle threads leave
after = held()
print("held", before, after)
assert after[0] <= before[0], "descriptors"
assert after[1] <= before[1] + 2, "threads"
assert after[2] <= before[2] + 64 * 2**20, "memory"
assert after[3] <= before[3] + 256, "MiB of a GPU"  # the other process may hold a group
assert not [name for name in os.listdir("/dev/shm") if "jax_ep" in name]
print("passed")
"""

MISSING = """
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
"""

MIDDLE = """
group = jax_ep.Group.open(mesh, "ep", timeout=3.0)
def step(x, ids):
    if "calls" in sys.argv:
        x = echo(group, x, ids) / R
    return x + 0 * jax.lax.psum(x, "ep") if "psums" in sys.argv else x
# A launch that fills a GPU's queue waits for the GPU: behind a psum whose peer has gone, for ever.
length = 50 if "psums" in sys.argv and jax.devices()[0].platform == "gpu" else 500
def steps(x, ids):
    return jax.lax.scan(lambda x, _: (step(x, ids), None), x, length=length)[0]
def kill():
    print("killed", time.time(), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
run = on_group(steps, group)
group.check(run(x, ids))
if me == 1:
    threading.Timer(0.3, kill).start()
try:
    while True:
        y = run(x, ids)
        group.check(y)
except jax_ep.PeerTimeoutError as e:
    print("raised", time.time())
    print(e)
    sys.exit(7)
"""

LATE = """
group = jax_ep.Group.open(mesh, "ep", timeout=1.0)
def step(x, ids):
    y = echo(group, x, ids)
    return y + jax.lax.psum(y, "ep")
run = on_group(step, group)
group.check(run(x, ids))
if me == 1:
    time.sleep(4)
start = time.monotonic()
try:
    with group:
        y = run(x, ids)
except jax_ep.PeerTimeoutError as e:
    print("waited", time.monotonic() - start)
    print(e)
    sys.exit(7)
"""

REOPENED = """
group = jax_ep.Group.open(mesh, "ep", timeout=5.0)
run = on_group(lambda x, ids: echo(group, x, ids), group)
assert group.backend != "xla", group.info()
good = x * num_ranks_of(ids).astype(np.float32)
assert_same_bits(run(x, ids), good)
for turn in range(2):
    if me == turn:
        time.sleep(10)  # late, not lost
    y = run(x, ids)
    try:
        group.check(y)
        raise AssertionError("nothing was told")
    except jax_ep.PeerTimeoutError as e:
        print(e)
    in_flight = [run(x, ids) for _ in range(3 * me)]
    if me != turn:
        time.sleep(5)  # to open it together
    group.close()
    group = jax_ep.Group.open(mesh, "ep", timeout=30.0 if turn else 5.0)
    for _ in range(3):
        y = run(x, ids)
        group.check(y)
        assert_same_bits(y, good)
print("passed")
"""

# Each process, or each pair of processes, claims to be on a host of its own.
HOSTS = """
from jax.sharding import Mesh
from jax_ep._src.processes import unix_links
from jax_ep.testing.ranks import on_ranks, place
per_host = int(sys.argv[1])
unix_links.host = lambda: f"host{me // per_host}"
num_hosts = jax.process_count() // per_host
devices = np.array(jax.devices()).reshape(num_hosts, -1)
num_slices, R = devices.shape
mesh = Mesh(devices, ("data", "expert"))
experts = (ids % (4 * R)).reshape(num_slices * R, *ids.shape[1:])
"""

TRAIN_OVER_HOSTS = """
with jax_ep.Group.open(mesh, "expert", timeout=60.0) as group:
    info = group.info()
    assert (info.backend, info.num_slices) == (sys.argv[2], num_slices), info
    def step(x, ids, scale):
        def loss(scale):
            return (echo(group, x * scale, ids) ** 2).sum()
        value, gradient = jax.value_and_grad(loss)(scale)
        sums = jax_ep.all_reduce(x, group=group)
        if "shares" not in sys.argv:  # NCCL takes no two ranks on a GPU
            value, gradient = jax.lax.psum((value, gradient), ("data", "expert"))
        return value[None], gradient, sums
    run = on_ranks(step, mesh, check_vma=False)
    scale = np.full((num_slices * R, 1), 2.0, np.float32)
    for _ in range(3):
        value, gradient, sums = run(*place((x, experts, scale), mesh))
    counts = num_ranks_of(experts).astype(np.float32)
    totals = ((2 * x * counts) ** 2).sum(axis=(1, 2))[:, None]
    if "shares" not in sys.argv:
        totals = np.full_like(totals, totals.sum())
    assert_same_bits(value, totals)
    assert_same_bits(gradient, totals)
    expected = x.reshape(num_slices, R, *x.shape[1:]).sum(1).repeat(R, axis=0)
    assert_same_bits(sums, expected)
print("passed")
"""

RAISES = """
with jax_ep.Group.open(mesh, "ep", timeout=3.0) as group:
    run = on_group(lambda x, ids: echo(group, x, ids), group)
    group.check(run(x, ids))
    if me == int(sys.argv[1]):
        raise ValueError("not today")
    try:
        group.check(run(x, ids))
    except jax_ep.PeerTimeoutError as e:
        print(e)
        sys.exit(7)
"""


INTERRUPTED = """
group = jax_ep.Group.open(mesh, "ep", timeout=90.0)
run = on_group(lambda x, ids: echo(group, x, ids), group)
group.check(run(x, ids))
how, who = sys.argv[1:]
waits = {"asarray": lambda y: [np.asarray(s.data) for s in y.addressable_shards],
         "check": group.check}
group._native_group.handle.skip_rank(R - 1)
y = run(x, ids)
if str(me) in who:
    threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()
try:
    while True:  # the calls of the rank that stays away do not wait: its process is told later
        waits[how](y)
        group.check(y)
        time.sleep(0.01)
except jax_ep.GroupInterruptedError as e:
    print(e)
    sys.exit(7)
"""


def run_on_cpus(program, *argv, processes=2, devices=2, deadline=240.0, exit_codes=None):
    return launch.launch(
        ["-c", START + program, *argv],
        num_processes=processes,
        num_devices=devices,
        deadline=deadline,
        environment={"JAX_PLATFORMS": "cpu"},
        exit_codes=exit_codes,
    )
