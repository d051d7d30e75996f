"""The operations on NVIDIA GPUs: JAX_PLATFORMS=cuda,cpu pytest -m gpu."""

import gc
import os
import signal
import threading
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

import jax_ep
from jax_ep.testing import conformance
from jax_ep.testing.conformance.layouts import get_dispatch_layout
from jax_ep.testing.ranks import on_ranks

pytestmark = pytest.mark.gpu

# Back ends that must pass the whole suite.
COMPLETE = ("cuda", "xla")


def _mesh():
    return Mesh(np.array(jax.devices("gpu")), ("ep",))


@pytest.fixture(scope="module")
def group():
    with jax_ep.Group.open(
        _mesh(), "ep", name="gpu", timeout=120.0, in_flight_bytes=32 << 20
    ) as opened:
        yield opened


def test_info_gives_reasons(group):
    info = group.info()
    assert info.backend == "cuda"
    assert info.backends["cuda"] == info.backends["xla"] == "usable"
    assert info.backends["cpu"] == "the mesh's devices are not CPU devices"


@pytest.fixture(scope="module")
def of_many_tokens():
    """Returns a group whose plain calls never take the kernels for few tokens."""
    with jax_ep.Group.open(
        _mesh(), "ep", name="many", num_sms=16, timeout=120.0, in_flight_bytes=32 << 20
    ) as opened:
        yield opened


@pytest.mark.parametrize("backend", COMPLETE)
@pytest.mark.parametrize("check", conformance.CHECKS, ids=str)
def test_back_ends_pass_the_suite(of_many_tokens, backend, check):
    """test_gpu_low_latency.py runs the checks with the kernels for few tokens."""
    assert check.not_usable(of_many_tokens, backend) is None
    check(of_many_tokens, backend)


@pytest.mark.parametrize("backend", ["cuda", "xla"])
@pytest.mark.parametrize("experts_per_rank", [4, 128, 8192], ids=lambda n: f"{n}_experts")
@pytest.mark.parametrize("num_tokens", [1, 257, 3000])
def test_get_dispatch_layout_counts_right(group, backend, num_tokens, experts_per_rank):
    """Counters are small and large, in shared memory and beyond it, in a captured loop."""
    sizes = {"num_tokens": num_tokens, "num_topk": 4, "experts_per_rank": experts_per_rank}
    get_dispatch_layout(group, backend, **sizes)


def test_too_many_choices_are_refused(group):
    x, ids = np.ones((group.num_ranks, 4, 8), np.float32), np.zeros((group.num_ranks, 4, 33), int)
    call = partial(jax_ep.dispatch, group=group, num_experts=64 * group.num_ranks)
    with pytest.raises(jax_ep.ConfigError, match=r"at most 32 choices a token.*num_topk=33"):
        on_ranks(lambda x, i: call(x, i).x, group.mesh)(x, ids.astype(np.int32))


def test_rows_of_more_than_a_gib_are_refused(group):
    """Kernels count the bytes of a row in 32 bits, so they would copy a part of a wider row."""
    hidden = 2**29 + 8

    def call(ids):
        x = jnp.zeros((1, hidden), jnp.bfloat16)
        received = jax_ep.dispatch(x, ids, group=group, num_experts=group.num_ranks)
        return received.x[:, :8]

    ids = np.zeros((group.num_ranks, 1, 1), np.int32)
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"dispatch: a row of array 0 has 107374"):
        jax.block_until_ready(on_ranks(call, group.mesh)(ids))


def _echo(group, x, ids, num_sms=None):
    """Brings every token back once for each rank that it was sent to."""
    options = {"group": group, "num_experts": 8 * group.num_ranks, "num_sms": num_sms}
    out = jax_ep.dispatch(x, ids, **options)
    y = jax_ep.combine(out.x, out.handle, num_sms=num_sms)
    ranks = jnp.where(ids >= 0, ids // 8, -1)
    sent = jnp.stack([jnp.any(ranks == r, axis=1) for r in range(group.num_ranks)])
    return y, x * jnp.sum(sent, axis=0, dtype=x.dtype)[:, None]


def _random_ids(key, num_tokens, num_topk, num_experts):
    """Makes a random routing, masked at random: from every rank to every rank, all or none."""
    key, kind, mask = jax.random.split(key, 3)
    ids = jax.random.randint(key, (num_tokens, num_topk), 0, num_experts)
    share = jnp.array([0.0, 0.1, 0.9, 1.0])[jax.random.randint(kind, (), 0, 4)]
    return jnp.where(jax.random.uniform(mask, ids.shape) < share, -1, ids)


@pytest.mark.parametrize(("num_steps", "delayed"), [(50_000, False), (50_000, True)])
@pytest.mark.timeout(280)
def test_many_calls_give_right_values(group, num_steps, delayed):
    """A captured loop makes two calls a step with random routings; ranks come late by turns."""

    def run(x):
        rank = jax.lax.axis_index("ep")

        def step(carry, key):
            x, num_wrong = carry
            if delayed:
                # x depends on this loop, so it ends before the call; it is long in every 16th step.
                late = jax.random.randint(jax.random.fold_in(key, 99), (), -3000, 200)
                extra = jax.lax.fori_loop(0, late, lambda i, a: a + i % 2, jnp.int32(0))
                x = x + jnp.minimum(extra, 0)
            ids = _random_ids(key, x.shape[0], 4, 8 * group.num_ranks)
            y, expected = _echo(group, x, ids)
            num_wrong += jnp.sum(y != expected)
            return ((x + 1) % 64, num_wrong), None

        keys = jax.random.split(jax.random.fold_in(jax.random.key(0), rank), num_steps)
        zero = jax.lax.pcast(jnp.int32(0), "ep", to="varying")
        return jax.lax.scan(step, (x, zero), keys)[0][1]

    x = np.arange(group.num_ranks * 32 * 128, dtype=np.float32).reshape(-1, 32, 128) % 61
    num_wrong = on_ranks(run, group.mesh)(x)
    group.check(num_wrong)
    assert np.asarray(num_wrong).tolist() == [0] * group.num_ranks


@pytest.mark.parametrize("num_sms", [1, 3, 64, 1000])
def test_any_number_of_sms_gives_the_same(group, num_sms):
    x = np.arange(group.num_ranks * 300 * 256, dtype=np.float32).reshape(-1, 300, 256) % 251
    ids = np.random.default_rng(0).integers(-1, 8 * group.num_ranks, (group.num_ranks, 300, 5))
    fn = on_ranks(partial(_echo, group, num_sms=num_sms), group.mesh)
    y, expected = fn(x, ids.astype(np.int32))
    np.testing.assert_array_equal(y, expected)


def test_two_groups_that_take_turns_meet(group):
    x = np.ones((group.num_ranks, 16, 64), np.float32)
    ids = np.random.default_rng(0).integers(-1, 8 * group.num_ranks, (group.num_ranks, 16, 3))
    with jax_ep.Group.open(_mesh(), "ep", name="other") as other:

        def fn(x, ids):
            results = []
            for _ in range(8):
                for g in (group, other):
                    y, expected = _echo(g, x, ids)
                    results.append(jnp.sum(y != expected))
                    x = x + 1
            return jnp.stack(results)

        assert not np.asarray(on_ranks(fn, group.mesh)(x, ids.astype(np.int32))).any()


@pytest.mark.parametrize("num_calls", [1, 200], ids=["one_call", "captured_loop"])
def test_a_missing_peer_ends_in_an_exception(group, num_calls):
    """The exception names the missing rank, results are NaN, and a new group works."""
    if group.num_ranks < 2:
        pytest.skip("needs two GPUs")
    x = np.ones((group.num_ranks, 4, 8), np.float32)
    ids = np.zeros((group.num_ranks, 4, 1), np.int32)

    def run(g, x, ids):
        return jax.lax.scan(lambda x, _: (_echo(g, x, ids)[0], None), x, length=num_calls)[0]

    failing = jax_ep.Group.open(_mesh(), "ep", name="failing", timeout=1.0)
    step = on_ranks(partial(run, failing), failing.mesh)
    np.testing.assert_array_equal(step(x, ids), x)
    failing.check()

    failing._native_group.handle.skip_rank(1)
    start = time.monotonic()
    y = step(x, ids)
    with pytest.raises(jax_ep.PeerTimeoutError, match="waited for rank 1") as caught:
        failing.check()
    assert time.monotonic() - start < failing.timeout + 1.0
    assert np.isnan(np.asarray(y)).all()
    error = caught.value
    ranks = group.num_ranks
    assert (error.op, error.peer, error.expected, error.seen) == ("dispatch", 1, ranks, ranks - 1)

    # Later launches end at once, no function can be traced, and the devices still work.
    start = time.monotonic()
    assert np.isnan(np.asarray(step(x, ids))).all()
    assert time.monotonic() - start < failing.timeout
    with pytest.raises(jax_ep.PeerTimeoutError):
        on_ranks(partial(run, failing), failing.mesh)(x, ids)
    failing.close()
    with jax_ep.Group.open(_mesh(), "ep", name="next") as fresh:
        np.testing.assert_array_equal(on_ranks(partial(run, fresh), fresh.mesh)(x, ids), x)


def test_ranks_at_different_calls_are_an_error(group):
    """One rank dispatches, the other combines: an exception, and the devices still work."""
    if group.num_ranks < 2:
        pytest.skip("needs two GPUs")
    x = np.ones((group.num_ranks, 4, 8), np.float32)
    ids = np.zeros((group.num_ranks, 4, 1), np.int32)
    failing = jax_ep.Group.open(_mesh(), "ep", name="diverging", timeout=5.0)

    def diverge(x, ids):
        out = jax_ep.dispatch(x, ids, group=failing, num_experts=8 * group.num_ranks)
        is_first = jax.lax.axis_index("ep") == 0

        def combine_first():
            y = jax_ep.combine(out.x, out.handle)
            return y + jax_ep.dispatch(y, handle=out.handle).x[:4]

        def dispatch_first():
            rows = jax_ep.dispatch(x, handle=out.handle).x
            return jax_ep.combine(rows, out.handle) + x

        return jax.lax.cond(is_first, combine_first, dispatch_first)

    jax.block_until_ready(on_ranks(diverge, failing.mesh)(x, ids))
    with pytest.raises(jax_ep.GroupError, match="at another call"):
        failing.check()
    failing.close()
    np.testing.assert_array_equal(on_ranks(partial(_echo, group), group.mesh)(x, ids)[0], x)


def test_another_device_order_is_an_error(group):
    """A program over the same devices in another order raises, and does not misroute."""
    if group.num_ranks < 2:
        pytest.skip("needs two GPUs")
    x = np.ones((group.num_ranks, 4, 8), np.float32)
    ids = np.zeros((group.num_ranks, 4, 1), np.int32)
    backwards = Mesh(np.array(jax.devices("gpu")[::-1]), ("ep",))
    with pytest.raises(jax_ep.GroupError, match=r"jax\.shard_map runs over the mesh"):
        on_ranks(partial(_echo, group), backwards)(x, ids)


def test_beside_gives_the_same(group):
    """A computation beside a dispatch and a combine keeps its value and gradient."""
    rng = np.random.default_rng(0)
    ranks, hidden = group.num_ranks, 256
    x = rng.standard_normal((ranks, 512, hidden), np.float32)
    w = rng.standard_normal((ranks, hidden, hidden), np.float32)
    ids = rng.integers(0, 8 * ranks, (ranks, 512, 4)).astype(np.int32)

    def loss(x, w, ids, overlaps):
        def shared(a, w):
            return jnp.tanh(a @ w)

        out = jax_ep.dispatch(x, ids, group=group, num_experts=8 * ranks)
        aside = (jax_ep.overlap(shared) if overlaps else shared)(x, w)
        return jnp.sum(jax_ep.combine(out.x, out.handle) * aside)

    def run(overlaps):
        def both(x, w, ids):
            values = jax.value_and_grad(partial(loss, overlaps=overlaps), (0, 1))(x, w, ids)
            return jax.tree.map(jnp.atleast_1d, values)

        # By default XLA chooses TF32 or not for matmuls, whichever is faster when it compiles.
        with jax.default_matmul_precision("highest"):
            return on_ranks(both, group.mesh)(x, w, ids)

    for got, expected in zip(jax.tree.leaves(run(True)), jax.tree.leaves(run(False)), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)  # fusions differ


def _repeat(group):
    """Makes a program that XLA captures: it repeats the same calls."""

    def fn(x, ids):
        return jax.lax.scan(lambda x, _: (_echo(group, x, ids)[0], None), x, length=6)[0]

    return on_ranks(fn, group.mesh)


@pytest.mark.parametrize("in_flight", [0, 2])
def test_compiled_functions_run_with_the_group_that_is_opened_again(in_flight):
    num_ranks = len(jax.devices("gpu"))
    if num_ranks < 2:
        pytest.skip("needs two GPUs")
    x = np.ones((num_ranks, 64, 256), np.float32)
    ids = np.zeros((num_ranks, 64, 1), np.int32)
    group = jax_ep.Group.open(_mesh(), "ep", name="again", timeout=1.0)
    step = _repeat(group)
    for _ in range(4):
        np.testing.assert_array_equal(step(x, ids), x)
    for timeout in (0.5, 30.0):
        group._native_group.handle.skip_rank(num_ranks - 1)
        with pytest.raises(jax_ep.PeerTimeoutError):
            group.check(step(x, ids))
        late = [step(x, ids) for _ in range(in_flight)]
        group.close()
        group = jax_ep.Group.open(_mesh(), "ep", name="again", timeout=timeout)
        assert all(np.isnan(np.asarray(y)).all() for y in late)
        for _ in range(3):
            y = step(x, ids)
            group.check(y)
            np.testing.assert_array_equal(y, x)
    group.close()


def test_a_program_of_a_group_in_other_memory_raises(monkeypatch):
    """Captured programs refer to memory. If the memory is gone, every launch raises."""
    num_ranks = len(jax.devices("gpu"))
    x = np.ones((num_ranks, 64, 256), np.float32)
    ids = np.zeros((num_ranks, 64, 1), np.int32)
    with jax_ep.Group.open(_mesh(), "ep", name="moved", timeout=20.0) as group:
        step = _repeat(group)
        for _ in range(4):
            np.testing.assert_array_equal(step(x, ids), x)
    monkeypatch.setenv("JAX_EP_STAGING_MB", "3")
    with jax_ep.Group.open(_mesh(), "ep", name="moved", timeout=20.0) as group:
        for _ in range(2):
            with pytest.raises(jax.errors.JaxRuntimeError, match="compile it again"):
                np.asarray(step(x, ids))
        np.testing.assert_array_equal(_repeat(group)(x, ids), x)


def test_the_end_of_a_group_waits_without_pythons_lock():
    """The devices may wait for a callback, which needs the lock."""
    num_ranks = len(jax.devices("gpu"))
    seen = []

    group = jax_ep.Group.open(_mesh(), "ep", name="callbacks", timeout=20.0)

    def fn(x, group=group):
        x = jax_ep.all_reduce(x, group=group)
        for _ in range(20):
            jax.debug.callback(lambda v: (time.sleep(0.05), seen.append(float(v[0]))), x)
            x = x + 1
        return x

    run = on_ranks(fn, group.mesh, check_vma=False)
    y = run(np.ones((num_ranks, 8), np.float32))
    group.close()
    del run, fn, group
    gc.collect()
    jax.clear_caches()
    np.testing.assert_array_equal(y, np.full((num_ranks, 8), num_ranks + 20))
    jax.effects_barrier()
    assert len(seen) == 20 * num_ranks


def _interrupt_soon():
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()


def _norm(group, x):
    return jax_ep.all_reduce_residual_rmsnorm(x, x, x[0], eps=1e-3, group=group)[0]


# Calls that wait for packets, but for the last two.
WAITS = {
    "few tokens": lambda group, x, ids: _echo(group, x, ids)[0],
    "a small sum": lambda group, x, _: jax_ep.all_reduce(x, group=group, algorithm="low_latency"),
    "a fused norm": lambda group, x, _: _norm(group, x),
    "many tokens": lambda group, x, ids: _echo(group, x, ids, num_sms=8)[0],
    "a sum": lambda group, x, _: jax_ep.all_reduce(x, group=group, algorithm="one_shot"),
}


@pytest.mark.parametrize("wait", [np.asarray, lambda y: y.block_until_ready()])
@pytest.mark.parametrize("call", WAITS)
def test_an_interrupt_ends_a_wait_for_a_peer(group, wait, call):
    """KeyboardInterrupt comes as usual, the group has failed, and the devices still work."""
    if group.num_ranks < 2:
        pytest.skip("needs two GPUs")
    x = np.ones((group.num_ranks, 4, 8), np.float32)
    ids = np.zeros((group.num_ranks, 4, 1), np.int32)
    failing = jax_ep.Group.open(_mesh(), "ep", name="interrupted", timeout=60.0)
    step = on_ranks(partial(WAITS[call], failing), failing.mesh)
    failing.check(step(x, ids))
    failing._native_group.handle.skip_rank(1)
    y = step(x, ids)
    start = time.monotonic()
    _interrupt_soon()
    with pytest.raises(KeyboardInterrupt):
        wait(y)
    with pytest.raises(jax_ep.GroupInterruptedError, match="while it waited for its peers"):
        failing.check(y)
    assert time.monotonic() - start < failing.timeout / 4
    assert np.isnan(np.asarray(y)).all()
    with pytest.raises(jax_ep.GroupInterruptedError):
        on_ranks(partial(WAITS[call], failing), failing.mesh)(x, ids)
    failing.close()
    with jax_ep.Group.open(_mesh(), "ep", name="after interrupted") as fresh:
        y = on_ranks(lambda x, ids: _echo(fresh, x, ids)[0], fresh.mesh)(x, ids)
        np.testing.assert_array_equal(y, x)


def test_an_interrupt_while_nothing_waits_harms_nothing(group):
    """Calls of microseconds run while the signal comes."""
    x = np.ones((group.num_ranks, 4, 8), np.float32)
    ids = np.zeros((group.num_ranks, 4, 1), np.int32)
    step = on_ranks(lambda x, ids: _echo(group, x, ids)[0], group.mesh)
    group.check(step(x, ids))

    def run_for_long():
        while True:
            step(x, ids).block_until_ready()

    _interrupt_soon()
    with pytest.raises(KeyboardInterrupt):
        run_for_long()
    end = time.monotonic() + 1.0
    while time.monotonic() < end:
        step(x, ids).block_until_ready()
    np.testing.assert_array_equal(step(x, ids), x)
    group.check()
