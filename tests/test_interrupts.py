"""Ctrl-C ends a wait for a missing peer at once, and harms nothing else."""

import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from process_programs import INTERRUPTED, run_on_cpus
from steps import make_echo

import jax_ep
from jax_ep.testing.ranks import make_mesh, on_ranks

X, IDS = np.ones((3, 4, 8), np.float32), np.zeros((3, 4, 1), np.int32)
TIMEOUT = 60.0
PROMPT = TIMEOUT / 4  # a wait without an interrupt takes the timeout
GRACE = 0.3  # equals Interrupts::kGrace


@pytest.fixture
def group():
    with_handler = signal.getsignal(signal.SIGINT)
    opened = jax_ep.Group.open(make_mesh(3), "ep", name="interrupts", timeout=TIMEOUT)
    yield opened
    opened.close()
    signal.signal(signal.SIGINT, with_handler)


@pytest.fixture
def step(group):
    """Returns a compiled step that has run once."""
    run = on_ranks(make_echo(group), group.mesh)
    group.check(run(X, IDS))
    return run


def interrupt_soon(delay=0.5):
    timer = threading.Timer(delay, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    return timer


WAITS = {
    "block_until_ready": lambda group, y: y.block_until_ready(),
    "asarray": lambda group, y: np.asarray(y),
    "check": lambda group, y: group.check(),
    "check of results": lambda group, y: group.check(y),
}


@pytest.mark.parametrize("wait", WAITS)
def test_an_interrupt_ends_a_wait(group, step, wait):
    group._native_group.handle.skip_rank(1)
    y = step(X, IDS)
    start = time.monotonic()
    interrupt_soon()
    with pytest.raises(KeyboardInterrupt):
        WAITS[wait](group, y)
    assert time.monotonic() - start < PROMPT
    expected = r"dispatch: the process of rank [02] was interrupted while it waited for rank 1: "
    with pytest.raises(jax_ep.GroupInterruptedError, match=expected + "expected 3 ranks, got 2"):
        group.check(y)
    assert np.isnan(np.asarray(y)).all()
    with pytest.raises(jax_ep.GroupInterruptedError):
        on_ranks(make_echo(group), group.mesh)(X, IDS)
    with jax_ep.Group.open(make_mesh(3), "ep", name="next") as fresh:
        np.testing.assert_array_equal(on_ranks(make_echo(fresh), fresh.mesh)(X, IDS), X)


def test_a_second_interrupt_ends_the_next_wait(group, step):
    """The second wait is of another group in the same program."""
    other = jax_ep.Group.open(make_mesh(3), "ep", name="other", timeout=TIMEOUT)
    second = on_ranks(make_echo(other), other.mesh)
    other.check(second(X, IDS))
    for run, of in ((step, group), (second, other)):
        of._native_group.handle.skip_rank(1)
        y = run(X, IDS)
        interrupt_soon()
        with pytest.raises(KeyboardInterrupt):
            y.block_until_ready()
        with pytest.raises(jax_ep.GroupInterruptedError):
            of.check(y)
    other.close()


def test_an_interrupt_while_nothing_waits_harms_nothing(group, step):
    """The user of a notebook goes on after an interrupt."""

    def run_for_long():
        for _ in range(10_000):
            step(X, IDS)
            time.sleep(0.001)

    for _ in range(2):
        interrupt_soon(0.2)
        with pytest.raises(KeyboardInterrupt):
            run_for_long()
        time.sleep(3 * GRACE)
        np.testing.assert_array_equal(step(X, IDS), X)
        group.check()


def test_a_handler_that_was_set_meanwhile_is_found_by_check(group, step):
    """ipykernel sets a handler for each cell."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    group.check()
    group._native_group.handle.skip_rank(1)
    y = step(X, IDS)
    interrupt_soon()
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        y.block_until_ready()
    assert time.monotonic() - start < PROMPT


def test_a_handler_of_the_program_is_left_alone():
    """The handler may want to save something when the step is done."""
    seen = []
    before = signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
    try:
        group = jax_ep.Group.open(make_mesh(3), "ep", name="handler", timeout=4 * GRACE)
        run = on_ranks(make_echo(group), group.mesh)
        group.check(run(X, IDS))
        group._native_group.handle.skip_rank(1)
        y = run(X, IDS)
        interrupt_soon(0.1)
        with pytest.raises(jax_ep.PeerTimeoutError):
            group.check(y)
        assert seen == [signal.SIGINT]
        group.close()
    finally:
        signal.signal(signal.SIGINT, before)


# --- Whole programs

PROGRAM = """
import os, signal, sys, threading, time
import numpy as np
sys.path.insert(0, sys.argv[1])
from jax_ep.testing import virtual_devices
from jax_ep.testing.ranks import make_mesh, on_ranks
virtual_devices()
import jax, jax_ep
from steps import make_echo
x, ids = np.ones((3, 4, 8), np.float32), np.zeros((3, 4, 1), np.int32)
mesh = make_mesh(3)

def interrupt(delay):
    threading.Timer(delay, os.kill, (os.getpid(), signal.SIGINT)).start()

def open_group(timeout=600.0):
    global step
    group = jax_ep.Group.open(mesh, "ep", timeout=timeout)
    step = on_ranks(make_echo(group), mesh)
    group.check(step(x, ids))
    return group
"""

ENDS = {
    "bare": """
group = open_group()
group._native_group.handle.skip_rank(1)
y = step(x, ids)
interrupt(0.5)
np.asarray(y)
""",
    "block": """
with open_group() as group:
    group._native_group.handle.skip_rank(1)
    y = step(x, ids)
    interrupt(0.5)
    y.block_until_ready()
""",
    "caught": """
group = open_group()
group._native_group.handle.skip_rank(1)
y = step(x, ids)
interrupt(0.5)
try:
    y.block_until_ready()
except KeyboardInterrupt:
    del y, step
raise KeyboardInterrupt
""",
    # The interpreter's exit would wait for a call that did not wait yet when the signal came. The
    # nap is longer than an exit takes: Python aborts a process whose callback ends during the exit.
    "later": """
with open_group() as group:
    def late(x, ids):
        def nap(x):
            time.sleep(4.0)
            return x
        return make_echo(group)(jax.pure_callback(nap, jax.typeof(x), x), ids)
    late = on_ranks(late, mesh)
    group.check(late(x, ids))
    group._native_group.handle.skip_rank(1)
    y = late(x, ids)
    interrupt(0.0)
    time.sleep(60)
""",
}


def run_program(body, **settings):
    return subprocess.run(
        [sys.executable, "-c", PROGRAM + body, os.path.dirname(__file__)],
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
        **settings,
    )


@pytest.mark.parametrize("end", ENDS)
def test_an_interrupted_program_ends(end):
    """The group of the program would wait for ten minutes."""
    done = run_program(ENDS[end])
    assert done.returncode == -signal.SIGINT, done.stderr
    assert "KeyboardInterrupt" in done.stderr


def test_a_program_without_python_s_handler_ends_as_before():
    body = (
        "signal.signal(signal.SIGINT, signal.SIG_DFL)\nopen_group()\ninterrupt(0)\ntime.sleep(60)"
    )
    assert run_program(body).returncode == -signal.SIGINT


def test_a_program_that_ignores_interrupts_goes_on():
    body = """
signal.signal(signal.SIGINT, signal.SIG_IGN)
group = open_group(timeout=3.0)
group._native_group.handle.skip_rank(1)
y = step(x, ids)
interrupt(0.1)
try:
    group.check()
except jax_ep.PeerTimeoutError:
    print("waited")
"""
    done = run_program(body)
    assert (done.returncode, done.stdout) == (0, "waited\n"), done.stderr


def test_an_interrupt_of_a_forked_child_leaves_the_parent_alone():
    """The parent's call still waits, and succeeds when its last rank comes."""
    body = """
with open_group() as group:
    def late(x, ids):
        def nap(x, rank):
            time.sleep(3.0 if rank == 1 else 0.0)
            return x
        rank = jax.lax.axis_index("ep")
        return make_echo(group)(jax.pure_callback(nap, jax.typeof(x), x, rank), ids)
    y = on_ranks(late, mesh)(x, ids)
    child = os.fork()
    if child == 0:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            time.sleep(1.0)
            os._exit(3)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
    np.testing.assert_array_equal(y, x)
print("passed")
"""
    done = run_program(body)
    assert (done.returncode, done.stdout) == (0, "passed\n"), done.stderr


@pytest.mark.parametrize("how", ["asarray", "check"])
@pytest.mark.parametrize("who", ["0", "1", "01"])
def test_an_interrupted_process_ends_and_the_others_raise(how, who):
    codes = [-signal.SIGINT if str(i) in who else 7 for i in range(2)]
    outputs = run_on_cpus(INTERRUPTED, how, who, exit_codes=codes, deadline=60.0)
    for i, output in enumerate(outputs):
        if str(i) in who:
            assert "KeyboardInterrupt" in output
        else:
            assert "was interrupted while it waited for rank 3" in output
