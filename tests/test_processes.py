"""Groups over several processes of CPU devices on one host."""

import re
import signal

import pytest
from process_programs import LATE, MIDDLE, MISSING, REOPEN, START

from jax_ep.testing import launch

CONFORMANCE = """
with jax_ep.Group.open(mesh, "ep", timeout=60.0) as group:
    backend = sys.argv[1]
    info = group.info()
    assert info.backend == "cpu", info
    assert info.backends["cpu"] == info.backends["xla"] == "usable", info
    checks = [c for c in conformance.CHECKS if c.not_usable(group, backend) is None]
    assert len(checks) > 50
    for check in checks[::int(sys.argv[2])]:
        print("checking", check, flush=True)
        check(group, backend)
print("passed")
"""

INDEPENDENT = """
with jax_ep.Group.open(mesh, "ep", timeout=60.0) as group:
    @jax.jit
    def layer(x, ids):
        return echo(group, x, ids)

    def fn(x, ids):
        calls = [layer(x * (i + 1), (ids + i) % (4 * R)) for i in range(64)]
        sums = [jax.lax.psum(x * (i + 1), "ep") for i in range(64)]
        last = jax.lax.scan(lambda x, _: (layer(x, ids) * 0 + x + 1, None), x, length=30)[0]
        return calls, sums, last

    run = on_group(fn, group)
    for _ in range(3):
        calls, sums, last = run(x, ids)
        for i, (y, s) in enumerate(zip(calls, sums)):
            assert_same_bits(y, x * (i + 1) * num_ranks_of((ids + i) % (4 * R)).astype(np.float32))
            assert_same_bits(s, np.tile(x.sum(axis=0) * (i + 1), (R, 1, 1)))
        assert_same_bits(last, x + 30)
print("passed")
"""

DISAGREE = """
try:
    jax_ep.Group.open(mesh, "ep", num_sms=20 + me, timeout=30.0)
except jax_ep.GroupError as e:
    print(e)
"""

ABSENT = """
start = time.monotonic()
try:
    jax_ep.Group.open(mesh, "ep", name=f"name{me}", timeout=2.0)
except jax_ep.GroupError as e:
    print(e)
print("waited", time.monotonic() - start < 3.0)
if me == 0:  # in vain; the next time the other one comes
    try:
        jax_ep.Group.open(mesh, "ep", name="late", timeout=1.0)
    except jax_ep.GroupError as e:
        assert "process 1 did not open" in str(e)
time.sleep(0 if me == 0 else 2.0)
with jax_ep.Group.open(mesh, "ep", name="late", timeout=20.0):
    print("opened late")
"""

LOCAL_FAILURES = """
from jax_ep import _backends, _jax_compat, _native_group, _self_test, _tuning

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
    "tuning": (_tuning, "load", fails),
    "back ends": (_backends, "resolve", fails),
    "opening": (_native_group.Opening, "open_cpu", fails),
    "native": (_native_group.Opening, "_open", fails),
    "opened": (jax_ep.Group, "_open_native", fails_after(jax_ep.Group._open_native)),
    "self-test": (_self_test, "run", fails_after(_self_test.run)),
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
    except MemoryError as e:
        assert me == 1
    except jax_ep.GroupError as e:
        assert me != 1 and str(e) == "Group.open: process 1 failed: no room", e
    assert time.monotonic() - start < 10.0, stage
    setattr(place, name, original)
    use()  # at once, whatever the others have read by now
    assert descriptors(before) <= before, stage
    print("told of", stage)
listed = _jax_compat.distributed_client().key_value_dir_get("jax_ep")
assert len(listed) == jax.process_count(), listed
assert not [name for name in os.listdir("/dev/shm") if "jax_ep" in name]
print("passed")
"""

HURRIES = """
rng = np.random.default_rng(me)
for i in range(15):
    time.sleep(rng.random() * 0.06)
    with jax_ep.Group.open(mesh, "ep", backend="xla", timeout=30.0):
        pass
    if i % 3 == 0:
        try:
            jax_ep.Group.open(mesh, "ep", num_sms=20 + me, timeout=30.0)
            raise AssertionError
        except jax_ep.GroupError as e:
            assert "disagree about num_sms" in str(e), e
print("passed")
"""

DIES = """
from jax_ep import _native_group
place, name = {
    "opening": (_native_group.Opening, "open_cpu"),
    "self-test": (jax_ep.Group, "wait_for_all"),
}[sys.argv[1]]
original = getattr(place, name)
def die(*args):
    if sys.argv[1] == "self-test":
        original(*args)
        if args[-1] != "compiled self-test":
            return
    os.kill(os.getpid(), signal.SIGKILL)
if me == 1:
    setattr(place, name, die)
start = time.monotonic()
try:
    jax_ep.Group.open(mesh, "ep", timeout=float(sys.argv[2]))
except jax_ep.PeerTimeoutError as e:
    print("waited", time.monotonic() - start)
    print(e)
    sys.exit(7)
"""

SHARES = """
from jax_ep import _bootstrap, _native_group, _sockets

class Native:  # as that of GPUs is
    def __init__(self):
        self.got = {}

    def export_seat(self, position, address):
        return [10 * position], os.memfd_create("control"), os.memfd_create("pool")

    def import_seat(self, position, told, control, pool):
        os.close(control)
        os.close(pool)
        self.got[position] = told

    def complete(self):
        others = [p for p, d in enumerate(mesh.devices.flat) if d.process_index != me]
        assert self.got == {p: [10 * p] for p in others}, self.got

def fails(*args, **kwargs):
    raise OSError("too many open files")

for swap, expected in ((_sockets.swap, None), (fails, "process 1: too many open files")):
    with _bootstrap.meet(mesh, "pools", timeout=30.0) as meeting:
        meeting.connect(reads_memory=False)
        before = len(os.listdir("/proc/self/fd"))
        if me == 1:
            _sockets.swap = swap
        start = time.monotonic()
        why_not = _native_group._share_devices(meeting, Native(), mesh, with_pools=True)
        assert why_not == expected, why_not
        assert time.monotonic() - start < 10.0
        assert len(os.listdir("/proc/self/fd")) == before
        meeting.close()
print("passed")
"""

UNREADABLE = """
from jax_ep import _native
native = _native.load("cpu")
if me == 1:
    native.try_reading = lambda pid, address, expected: "not today"
with jax_ep.Group.open(mesh, "ep", timeout=60.0) as group:
    info = group.info()
    print(info.backend, info.backends["cpu"])
    y = on_group(lambda x, ids: echo(group, x, ids), group)(x, ids)
    assert_same_bits(y, x * num_ranks_of(ids).astype(np.float32))
"""

HOSTS = """
from jax_ep import _sockets
_sockets.host = lambda: f"host{me}"
with jax_ep.Group.open(mesh, "ep", timeout=60.0) as group:
    info = group.info()
    assert "the mesh spans hosts or containers" in info.backends["cpu"], info
    assert info.backend == "xla", info
try:
    jax_ep.Group.open(mesh, "ep", backend="cpu", timeout=60.0)
except jax_ep.GroupError as e:
    print(e)
"""

SUBSETS = """
from jax.sharding import Mesh
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
    R = part.devices.size
    with (
        jax_ep.Group.open(part, "ep", name="a", timeout=60.0) as a,
        jax_ep.Group.open(part, "ep", name="b", timeout=60.0) as b,
    ):
        part_ids = ids[:R] % (4 * R)
        y = on_group(lambda x, ids: echo(a, x, ids) + 10 * echo(b, x, ids), a)(x[:R], part_ids)
        assert_same_bits(y, 11 * x[:R] * num_ranks_of(part_ids).astype(np.float32))
        print("passed", sorted(mine))
"""


def _run(program, *argv, processes=2, devices=2, deadline=240.0, exit_codes=None):
    return launch.launch(
        ["-c", START + program, *argv],
        num_processes=processes,
        deadline=deadline,
        environment={
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            "PJRT_NPROC": "16",
        },
        exit_codes=exit_codes,
    )


_ALL = {"marks": [pytest.mark.slow, pytest.mark.timeout(1500)]}


@pytest.mark.parametrize(
    ("processes", "devices", "backend", "every"),
    [
        (2, 4, "cpu", 12),
        (4, 2, "cpu", 60),
        (2, 2, "xla", 80),
        pytest.param(2, 4, "cpu", 1, **_ALL),
        pytest.param(4, 2, "cpu", 1, **_ALL),
        pytest.param(2, 2, "xla", 1, **_ALL),
    ],
)
@pytest.mark.timeout(300)
def test_conformance(processes, devices, backend, every):
    deadline = 1400.0 if every == 1 else 280.0
    sizes = {"processes": processes, "devices": devices, "deadline": deadline}
    for output in _run(CONFORMANCE, backend, str(every), **sizes):
        assert output.endswith("passed\n")


def test_independent_calls_mixed_with_psums():
    assert all(output.endswith("passed\n") for output in _run(INDEPENDENT, devices=4))


def test_groups_over_a_part_of_the_processes():
    outputs = _run(SUBSETS, processes=4)
    for process, output in enumerate(outputs):
        own, other = ("[0, 1]", "[2, 3]") if process < 2 else ("[2, 3]", "[0, 1]")
        assert re.findall(r"passed .*", output) == [f"passed {own}"]
        assert re.findall(r"refused .*", output) == [f"refused {other}"]


def test_opening_again_and_again_leaves_nothing_behind():
    assert all(output.endswith("passed\n") for output in _run(REOPEN, "50"))


def test_settings_that_differ_are_an_error_in_every_process():
    for output in _run(DISAGREE):
        assert "Group.open: the processes disagree about num_sms" in output
        assert "process 0 has 20, process 1 has 21" in output


def test_a_process_that_does_not_come_is_named():
    for me, output in enumerate(_run(ABSENT)):
        assert f"process {1 - me} did not open the same group" in output
        assert "waited True" in output
        assert "opened late" in output


@pytest.mark.timeout(300)
def test_a_failure_to_open_is_raised_in_every_process():
    """At once and with its reason, at every stage; nothing is left, and the next opening works."""
    for output in _run(LOCAL_FAILURES, processes=3):
        assert output.count("told of") == 6
        assert output.endswith("passed\n")


def test_openings_that_follow_one_another_do_not_mix():
    """The fastest process is already in the next one, or has failed, while others leave."""
    assert all(output.endswith("passed\n") for output in _run(HURRIES, processes=3))


@pytest.mark.parametrize(
    ("stage", "timeout", "how"),
    [("opening", 3.0, "until the timeout: expected 6 ranks, got 4"), ("self-test", 20.0, "ended")],
)
def test_a_process_that_dies_while_the_group_opens_is_named(stage, timeout, how):
    """At once where its ranks are waited for by the ranks of the others."""
    codes = [7, -signal.SIGKILL, 7]
    for output in _run(DIES, stage, str(timeout), processes=3, exit_codes=codes)[::2]:
        assert re.search(rf"waited for rank [23],? .*{how}", output)
        assert float(re.search(r"waited ([\d.]+)\n", output)[1]) < (
            10.0 if stage == "self-test" else timeout + 3.0
        )


def test_memory_is_shared_or_every_process_knows_why_not():
    assert all(output.endswith("passed\n") for output in _run(SHARES, processes=3))


def test_memory_that_cannot_be_read_leaves_xla():
    for output in _run(UNREADABLE):
        assert (
            "xla process 1: the memory of process 0 cannot be read: not today"
            in output.splitlines()
        )


def test_several_hosts_leave_xla():
    for output in _run(HOSTS):
        assert "backend 'cpu' is not usable here: the mesh spans hosts or containers" in output


@pytest.mark.parametrize("processes", [2, 3])
def test_a_killed_process_is_named_at_once(processes):
    """And the others leave with codes of their own, though JAX would wait for it."""
    codes = [7] * processes
    codes[1] = -signal.SIGKILL
    outputs = _run(MISSING, "SIGKILL", processes=processes, exit_codes=codes)
    for output in outputs[:1] + outputs[2:]:
        assert "waited for rank 2, whose process has ended" in output
        assert float(re.search(r"waited ([\d.]+)\n", output)[1]) < 2.0


@pytest.mark.parametrize("step", [["calls"], ["calls", "psums"], ["psums"]], ids="-".join)
def test_a_process_killed_within_a_program_is_named_at_once(step):
    """Also where the step has collectives of XLA's, which fail in their own way or wait."""
    survivor, killed = _run(MIDDLE, *step, exit_codes=[7, -signal.SIGKILL])
    assert "waited for rank 2, whose process has ended" in survivor
    raised, at = (re.search(r"(?:raised|killed) ([\d.]+)\n", o)[1] for o in (survivor, killed))
    assert 0 < float(raised) - float(at) < 2.0


def test_who_waits_is_told_while_a_collective_of_xla_still_waits():
    early, late = _run(LATE, exit_codes=[7, 7])
    assert re.search(r"dispatch: rank [01] waited for rank [23] until the timeout", early)
    assert float(re.search(r"waited ([\d.]+)\n", early)[1]) < 3.0
    assert re.search(r"waited for rank [0-3]", late)


def test_a_rank_that_does_not_come_is_named_in_every_process():
    for output in _run(MISSING, "skip", exit_codes=[7, 7]):
        assert "waited for rank 3 until the timeout: expected 4 ranks, got 3" in output
        assert float(re.search(r"waited ([\d.]+)\n", output)[1]) < 4.0
