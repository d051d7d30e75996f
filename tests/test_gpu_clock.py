"""The clocks of GPUs, and single steps that they time: JAX_PLATFORMS=cuda,cpu pytest -m gpu."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scripts import load_script

import jax_ep
from jax_ep.bench import reduce, steps, timing
from jax_ep.bench.contenders import few_tokens, low_latency_payload
from jax_ep.bench.shapes import Shape, make_inputs, make_point, make_reduce_point
from jax_ep.testing.clock import nanoseconds, read_clock
from jax_ep.testing.ranks import make_mesh, on_ranks

pytestmark = pytest.mark.gpu
NUM, DELAY_US = 20, 50
# A copy of an array as it is, in a kernel of its own or not; not the last part of a computation.
COPY = re.compile(r" copy(?:-start)?\((?:\S+ )?%(?:param|bitcast|get-tuple-element)")


def _point(layout, num_ranks):
    return make_point(
        "test",
        Shape(tokens=16, hidden=512, topk=4, experts=8 * num_ranks),
        dtype="bf16",
        layout=layout,
        num_ranks=num_ranks,
        balance=None,
        fill="zeros",
    )


@pytest.fixture(scope="module")
def group():
    num_ranks = len(jax.devices("gpu"))
    room = 2 * num_ranks * low_latency_payload(_point("expert", num_ranks))
    with jax_ep.Group.open(
        make_mesh(num_ranks), "ep", name="clock", timeout=60.0, low_latency_bytes=room
    ) as opened:
        yield opened
        opened.check()


def test_each_gpu_waits_for_its_own_delay(group):
    """Readings in a row grow, also when a command buffer replays them, and pass arrays on."""

    def run(delay_us, x):
        times, ticks = [], []
        for _ in range(NUM):
            reading = read_clock(delay_us, x)
            times.append(reading.time)
            ticks.append(reading.tick)
            x = reading.arrays
        return jnp.stack(times), jnp.stack(ticks), x

    delay_us = np.zeros((group.num_ranks, 1), np.int32)
    delay_us[-1] = DELAY_US
    x = np.arange(group.num_ranks * 6, dtype=np.float32).reshape(-1, 6)
    read = on_ranks(run, group.mesh)
    for _ in range(3):
        times, ticks, passed = read(delay_us, x)
        np.testing.assert_array_equal(passed, x)
        own = np.diff(nanoseconds(times).astype(np.int64), axis=1)
        assert np.all(own >= 0)
        assert np.all(own[-1] >= 1000 * DELAY_US)
        assert np.median(own[-1]) < 1000 * (DELAY_US + 50)
        assert np.all(np.asarray(ticks)[-1] > 0)
        assert not np.any(np.asarray(ticks)[:-1])


@pytest.mark.parametrize("layout", ["rank", "expert"])
@pytest.mark.parametrize("op", ["dispatch", "combine", "round_trip"])
def test_a_step_copies_nothing(group, op, layout):
    """What goes through a reading stays where it is, however long the chain."""
    point = _point(layout, group.num_ranks)
    program = timing.make_program(op, few_tokens(point, group))
    carry = timing.start(program, group.mesh, make_inputs(point, group.mesh))
    delay_us = np.zeros((group.num_ranks, 1), np.int32)
    copies = []
    for num_links in (2, 6):
        chain = on_ranks(steps.make_chain(program.run, num_links), group.mesh, check_vma=False)
        text = chain.lower(carry, delay_us).compile().as_text()
        assert text.count('"jax_ep.read_clock"') == num_links + 1
        copies.append(len(COPY.findall(text)))
    assert copies[0] == copies[1]


@pytest.mark.parametrize("kind", ["balanced", "skewed"])
def test_a_step_of_a_ragged_exchange_copies_nothing(group, kind):
    """Each call writes onto what the last one made."""
    script = load_script("ragged")
    exchange = script.make_exchange(kind, 16 << 10, 3, group.num_ranks)
    ours = script.ways(group, exchange, [], only_ours=True)
    (link,) = script.links(group, exchange, ours)
    copies = []
    for num_links in (2, 6):
        chain = on_ranks(steps.make_chain(link.run, num_links), group.mesh, check_vma=False)
        text = chain.lower(link.carry, np.zeros((group.num_ranks, 1), np.int32)).compile().as_text()
        assert text.count('"jax_ep.read_clock"') == num_links + 1
        copies.append(len(COPY.findall(text)))
    assert copies[0] == copies[1]


def test_xlas_ragged_exchange_is_timed_beside_ours(group):
    """With few steps if it is slow; where XLA has it."""
    if group.num_ranks < 2:
        pytest.skip("needs two GPUs")
    script = load_script("ragged")
    exchange = script.make_exchange("balanced", 16 << 10, 1, group.num_ranks)
    contenders = script.ways(group, exchange, [], only_ours=False)
    assert list(contenders) == ["jax_ep", "ragged_all_to_all", "all_to_all"]
    links = script.links(group, exchange, contenders)
    found = steps.measure(links, group, num_steps=100, slow_us=script.SLOW_US)
    for name, own in zip(contenders, found, strict=True):
        assert own.us["p50"] > 0, name
        assert own.count >= (16 if own.us["p50"] > script.SLOW_US / 2 else 100), name


def test_a_late_rank_makes_its_peers_wait(group):
    """The tick of the clock is known, and a step of the peers holds the whole delay."""
    point = make_reduce_point("all_reduce", 16 << 10, dtype="bf16", hidden=8192)
    entrants = reduce.contenders(point, group, ["cuda"], ["low_latency"])
    (found,) = steps.measure(
        reduce.links(point, group, entrants), group, num_steps=200, delay_us=DELAY_US
    )
    assert 0 < found.tick_ns < 10_000
    assert found.count >= 200
    assert found.clock_us > 0
    if group.num_ranks == 1:
        assert found.delayed_us is None
    else:
        assert found.us["p50"] > 0
        assert found.delayed_us is not None
        assert found.delayed_us["p50"] >= DELAY_US - 2
