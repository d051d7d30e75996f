"""Ctrl-C ends a wait for a missing peer at once, and harms nothing else."""

import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from process_programs import path_of, run_on_cpus
from steps import make_echo

import jax_ep
from jax_ep.testing.ranks import make_mesh, on_ranks

pytestmark = pytest.mark.dealt

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

ENDS = [
    "interrupted_bare",
    "interrupted_in_a_block",
    "interrupted_and_caught",
    "interrupted_before_a_wait",
]


def run_program(name):
    return subprocess.run(
        [sys.executable, path_of(name)], capture_output=True, text=True, check=False, timeout=100
    )


@pytest.mark.parametrize("end", ENDS)
def test_an_interrupted_program_ends(end):
    """The group of the program would wait for ten minutes."""
    done = run_program(end)
    assert done.returncode == -signal.SIGINT, done.stderr
    assert "KeyboardInterrupt" in done.stderr


def test_a_program_without_python_s_handler_ends_as_before():
    assert run_program("interrupted_without_a_handler").returncode == -signal.SIGINT


def test_a_program_that_ignores_interrupts_goes_on():
    done = run_program("ignores_interrupts")
    assert (done.returncode, done.stdout) == (0, "waited\n"), done.stderr


def test_an_interrupt_of_a_forked_child_leaves_the_parent_alone():
    """The parent's call still waits, and succeeds when its last rank comes."""
    done = run_program("interrupts_a_child")
    assert (done.returncode, done.stdout) == (0, "passed\n"), done.stderr


@pytest.mark.parametrize("how", ["asarray", "check"])
@pytest.mark.parametrize("who", ["0", "1", "01"])
def test_an_interrupted_process_ends_and_the_others_raise(how, who):
    codes = [-signal.SIGINT if str(i) in who else 7 for i in range(2)]
    outputs = run_on_cpus("interrupted_processes", how, who, exit_codes=codes, deadline=60.0)
    for i, output in enumerate(outputs):
        if str(i) in who:
            assert "KeyboardInterrupt" in output
        else:
            assert "was interrupted while it waited for rank 3" in output
