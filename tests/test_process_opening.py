"""Openings of groups over several processes on one host, and their failures."""

import re
import signal

import pytest
from process_programs import REOPEN, number_behind, run_on_cpus

DISAGREE = """
try:
    jax_ep.Group.open(mesh, "ep", num_sms=20 + me, timeout=30.0)
except jax_ep.GroupError as e:
    print(e)
import json, tempfile
from jax_ep._src.base import tables
steps = {op: [[8 + me * (op == "all_gather"), "one_shot"], [None, "psum"]] for op in tables.OPS}
with tempfile.NamedTemporaryFile("w") as file:
    json.dump({"tables": [{"device": "any", "num_ranks": 1, "ops": steps}]}, file)
    file.flush()
    os.environ["JAX_EP_TUNING"] = file.name
    try:
        jax_ep.Group.open(mesh, "ep", timeout=30.0)
    except jax_ep.GroupError as e:
        print(e)

# Numbers, a back end that "auto" takes in its place, and neither where the caller says more.
def open_with(combine, **options):
    budgets = {e: {"rank": {"sms": 8}, "expert": {"sms": 8}} for e in tables.EXCHANGES}
    budgets = {**budgets, "source": f"process {me}"}
    budgets["combine"] = {"rank": {"sms": 8}, "expert": combine}
    entry = {"device": "any", "num_ranks": 1, "budgets": budgets}
    with tempfile.NamedTemporaryFile("w") as file:
        json.dump({"tables": [entry]}, file)
        file.flush()
        os.environ["JAX_EP_TUNING"] = file.name
        try:
            jax_ep.Group.open(mesh, "ep", timeout=30.0, **options).close()
            print("opened", options)
        except jax_ep.GroupError as e:
            print(options, e)

open_with({"sms": 8 + me})
open_with({"sms": 8, **({"backend": "xla"} if me else {})})
open_with({"sms": 8, **({"backend": "xla"} if me else {})}, backend="cpu")
open_with({"sms": 8 + me}, num_sms=9)
open_with({"sms": 8})
"""

BUILDS = """
from jax_ep._src.base import native_modules
native = native_modules.load("cpu")
info = native.build_info()
print(info["build"])
other = {"build": "9", "protocol": 2, "sizes": {**info["sizes"], "WireMessage": 1}}
for part, value in other.items():
    if me == 1:
        native.build_info = lambda: {**info, part: value}
    try:
        jax_ep.Group.open(mesh, "ep", timeout=30.0)
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
if me == 0:  # this opening fails; the other process comes to the next one
    try:
        jax_ep.Group.open(mesh, "ep", name="late", timeout=1.0)
    except jax_ep.GroupError as e:
        assert "process 1 did not open" in str(e)
time.sleep(0 if me == 0 else 2.0)
with jax_ep.Group.open(mesh, "ep", name="late", timeout=20.0):
    print("opened late")
"""

LOCAL_FAILURES = """
from jax_ep._src.opening import usability
from jax_ep._src.base import jax_compat
from jax_ep._src.processes import native_group
from jax_ep._src.opening import open as open_body
from jax_ep._src.opening import self_test
from jax_ep._src.base import tables

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
    "opened": (open_body, "_open_native", fails_after(open_body._open_native)),
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
    except MemoryError as e:
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
from jax_ep._src.processes import native_group
from jax_ep._src.processes.rendezvous import Rendezvous
place, name = {
    "opening": (native_group.NativeOpening, "open_cpu"),
    "self-test": (Rendezvous, "gather"),
}[sys.argv[1]]
original = getattr(place, name)
def die(*args):
    if sys.argv[1] == "self-test":
        said = original(*args)
        if args[1] != "compiled self-test":
            return said
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
from jax_ep._src.processes.rendezvous import meet_processes
from jax_ep._src.processes import native_group
from jax_ep._src.processes import unix_links

class Native:  # as that of GPUs is
    def __init__(self):
        self.got = {}

    def export_position(self, position, address):
        return [10 * position], os.memfd_create("control"), os.memfd_create("pool")

    def import_position(self, position, told, control, pool):
        assert not os.get_inheritable(control) and not os.get_inheritable(pool)
        os.close(control)
        os.close(pool)
        self.got[position] = told

    def complete(self):
        others = [p for p, d in enumerate(mesh.devices.flat) if d.process_index != me]
        assert self.got == {p: [10 * p] for p in others}, self.got

def fails(*args, **kwargs):
    raise OSError("too many open files")

for swap, expected in ((unix_links.swap, None), (fails, "process 1: too many open files")):
    with meet_processes(mesh, "pools", [0] * R, timeout=30.0, stacklevel=1) as rendezvous:
        rendezvous.connect(reads_memory=False)
        before = len(os.listdir("/proc/self/fd"))
        if me == 1:
            unix_links.swap = swap
        start = time.monotonic()
        why_not = native_group._share_devices(rendezvous, Native(), jax.devices(), with_pools=True)
        assert why_not == expected, why_not
        assert time.monotonic() - start < 10.0
        assert len(os.listdir("/proc/self/fd")) == before
        rendezvous.close()
print("passed")
"""

STRANGERS = """
import socket
from jax_ep._src.processes import unix_links
listen = unix_links.listen
def listen_amid_strangers(*args):
    listener, address = listen(*args)
    with open("/proc/net/unix") as sockets:  # as anyone on this host can read
        assert any(line.endswith("@" + address + "\\n") for line in sockets)
    for _ in range(1000):
        strangers.append(socket.socket(socket.AF_UNIX))
        strangers[-1].setblocking(False)
        try:
            strangers[-1].connect("\\0" + address)
        except BlockingIOError:  # no more room
            break
    return listener, address
strangers = []
unix_links.listen = listen_amid_strangers
start = time.monotonic()
with jax_ep.Group.open(mesh, "ep", timeout=80.0) as group:
    assert time.monotonic() - start < 20.0
    assert group.backend == "cpu", group.info()
    y = on_group(lambda x, ids: echo(group, x, ids), group)(x, ids)
    assert_same_bits(y, x * num_ranks_of(ids).astype(np.float32))
print("passed")
"""

UNCONNECTED = """
from jax_ep._src.processes import unix_links
if me == 1:
    unix_links._pid_of_own_user = lambda link: None
start = time.monotonic()
with jax_ep.Group.open(mesh, "ep", timeout=80.0) as group:
    assert time.monotonic() - start < 20.0
    print(group.backend, group.info().backends["cpu"])
"""

UNREADABLE = """
from jax_ep._src.base import native_modules
native = native_modules.load("cpu")
if me == 1:
    native.try_reading = lambda pid, address, expected: "not today"
with jax_ep.Group.open(mesh, "ep", timeout=60.0) as group:
    info = group.info()
    print(info.backend, info.backends["cpu"])
    y = on_group(lambda x, ids: echo(group, x, ids), group)(x, ids)
    assert_same_bits(y, x * num_ranks_of(ids).astype(np.float32))
"""


def test_opening_again_and_again_leaves_nothing_behind():
    assert all(output.endswith("passed\n") for output in run_on_cpus(REOPEN, "50"))


def test_settings_that_differ_are_an_error_in_every_process():
    for output in run_on_cpus(DISAGREE):
        assert "Group.open: the processes disagree about num_sms" in output
        assert "process 0 has 20, process 1 has 21" in output
        assert "disagree about the table of all_gather: process 0 has [[8, 'one_shot']" in output
        about = "{} Group.open: the processes disagree about the budgets of combine: process 0 has "
        had = about + "{{'rank': {{'sms': 8}}, 'expert': {{'sms': 8}}}}, process 1 has "
        theirs = ["'sms': 9", "'sms': 8, 'backend': 'xla'"]
        assert output.splitlines()[-5:] == [
            *(f"{had.format({})}{{'rank': {{'sms': 8}}, 'expert': {{{t}}}}}" for t in theirs),
            "opened {'backend': 'cpu'}",
            "opened {'num_sms': 9}",
            "opened {}",
        ]


def test_builds_that_differ_are_an_error_in_every_process():
    """Builds differ in their name, their protocol, or the sizes of their messages."""
    differ = [
        ("'{build} (protocol", "'9 (protocol"),
        ("{build} (protocol 1;", "{build} (protocol 2;"),
        ("WireMessage", "WireMessage 1)"),
    ]
    for output in run_on_cpus(BUILDS):
        build, *messages = output.splitlines()
        assert re.fullmatch(r"\d+\.\d+\.\d+\+[0-9a-f]{12}", build)
        for message, (own, other) in zip(messages, differ, strict=True):
            assert message.startswith(
                "Group.open: the processes disagree about the build of their cpu modules: "
                "process 0 has"
            )
            first, second = message.split(", process 1 has ")
            assert own.format(build=build) in first
            assert other.format(build=build) in second


def test_a_process_that_does_not_come_is_named():
    for me, output in enumerate(run_on_cpus(ABSENT)):
        assert f"process {1 - me} did not open the same group" in output
        assert "waited True" in output
        assert "opened late" in output


@pytest.mark.timeout(300)
def test_a_failure_to_open_is_raised_in_every_process():
    """Processes raise at once, with the reason, at every stage, and the next opening works."""
    for output in run_on_cpus(LOCAL_FAILURES, processes=3):
        assert output.count("told of") == 6
        assert output.endswith("passed\n")


def test_openings_that_follow_one_another_do_not_mix():
    """The fastest process is in the next opening, or has failed, while others leave this one."""
    assert all(output.endswith("passed\n") for output in run_on_cpus(HURRIES, processes=3))


@pytest.mark.parametrize(
    ("stage", "timeout", "how"),
    [("opening", 3.0, "until the timeout: expected 6 ranks, got 4"), ("self-test", 20.0, "ended")],
)
def test_a_process_that_dies_while_the_group_opens_is_named(stage, timeout, how):
    """Processes raise at once if their ranks wait for its ranks."""
    codes = [7, -signal.SIGKILL, 7]
    for output in run_on_cpus(DIES, stage, str(timeout), processes=3, exit_codes=codes)[::2]:
        assert re.search(rf"waited for rank [23],? .*{how}", output)
        assert number_behind("waited", output) < (10.0 if stage == "self-test" else timeout + 3.0)


def test_memory_is_shared_or_every_process_knows_why_not():
    assert all(output.endswith("passed\n") for output in run_on_cpus(SHARES, processes=3))


def test_strangers_at_the_sockets_delay_no_process():
    """Strangers call as soon as a process listens, take all its room, and say nothing."""
    assert all(output.endswith("passed\n") for output in run_on_cpus(STRANGERS, processes=3))


def test_a_connection_that_cannot_be_made_leaves_xla():
    """All processes fall back at once, with the reason of the process that has failed."""
    for output in run_on_cpus(UNCONNECTED, processes=3):
        assert (
            "xla process 1: no connection between the processes: the listener for process 0 is of "
            "another user" in output.splitlines()
        )


def test_memory_that_cannot_be_read_leaves_xla():
    for output in run_on_cpus(UNREADABLE):
        assert (
            "xla process 1: the memory of process 0 cannot be read: not today"
            in output.splitlines()
        )
