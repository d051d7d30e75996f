"""read_clock: it has a place in a program, waits as long as it is told, and changes nothing."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_ep
from jax_ep._src.base import limits
from jax_ep.testing.clock import nanoseconds, read_clock
from jax_ep.testing.ranks import make_mesh, on_ranks

NUM = 4


def _read_in_a_row(delay_us, arrays):
    times, ticks = [], []
    for _ in range(NUM):
        reading = read_clock(delay_us, arrays)
        times.append(reading.time)
        ticks.append(reading.tick)
        arrays = reading.arrays
    return jnp.stack(times), jnp.stack(ticks), arrays


def _read_in_a_loop(delay_us, arrays):
    def turn(carry, _):
        reading = read_clock(delay_us, carry)
        return reading.arrays, (reading.time, reading.tick)

    arrays, (times, ticks) = jax.lax.scan(turn, arrays, length=NUM)
    return times, ticks, arrays


@pytest.mark.parametrize("read", [_read_in_a_row, _read_in_a_loop])
def test_each_rank_waits_for_its_own_delay(read):
    """No reading is merged, hoisted or dropped, and what goes through a reading stays as it is."""
    arrays = {
        "rows": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
        "ids": np.arange(4, dtype=np.int32).reshape(2, 2),
        "none": np.zeros((2, 0), np.float32),
    }
    delay_us = np.array([[0], [2000]], np.int32)
    program = on_ranks(read, make_mesh(2)).lower(delay_us, arrays).compile()
    assert program.as_text().count('"jax_ep.read_clock"') == (NUM if read is _read_in_a_row else 1)
    times, ticks, passed = program(delay_us, arrays)
    jax.tree.map(np.testing.assert_array_equal, passed, arrays)
    steps = np.diff(nanoseconds(times).astype(np.int64), axis=1)
    assert np.all(steps[0] > 0)
    assert np.all(steps[1] >= 2_000_000)
    assert not np.any(ticks[0])  # rank 0 does not wait
    assert np.all(np.asarray(ticks[1]) > 0)


@pytest.mark.parametrize("delay_us", [-1, 2**31 - 1])
def test_delays_have_bounds(delay_us):
    """A delay below 0 is none, and one above a second is a second."""
    start = time.monotonic_ns()
    read = read_clock(np.array([delay_us], np.int32), np.zeros(1, np.float32))
    waited = int(nanoseconds(read.time)) - start  # both read the same clock
    assert limits.MAX_DELAY_US == 1_000_000
    assert waited >= (0 if delay_us < 0 else 1_000_000_000)
    assert waited < 100_000_000_000
    assert (int(read.tick[0]) == 0) == (delay_us < 0)


def test_a_reading_comes_behind_what_makes_its_arrays():
    """Two readings enclose a computation, which takes what the first one returns."""

    @jax.jit
    def run(x):
        zero = jnp.zeros(1, jnp.int32)
        first = read_clock(zero, x)
        wait = read_clock(zero + 3000, first.arrays)
        second = read_clock(zero, wait.arrays)
        return first.time, second.time

    first, second = (int(nanoseconds(t)) for t in run(np.ones((4, 4), np.float32)))
    assert second - first >= 3_000_000


def test_a_reading_needs_arrays():
    with pytest.raises(jax_ep.ConfigError, match="arrays must hold at least one"):
        read_clock(np.zeros(1, np.int32), ())


def test_operands_of_a_wrong_size_are_refused():
    with pytest.raises(jax.errors.JaxRuntimeError, match="delay_us has 2 elements"):
        jax.block_until_ready(read_clock(np.zeros(2, np.int32), np.zeros(1, np.float32)))


def test_words_are_joined():
    assert nanoseconds(np.array([[5, 0], [1, 2]], np.uint32)).tolist() == [5, 2**33 + 1]
