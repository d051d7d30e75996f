"""Dispatches and combines of few tokens on NVIDIA GPUs: JAX_PLATFORMS=cuda,cpu pytest -m gpu."""

import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_ep
from jax_ep.testing import conformance
from jax_ep.testing.compare import assert_same_bits
from jax_ep.testing.conformance.check import ROUND_TRIP
from jax_ep.testing.ranks import make_mesh, on_ranks

pytestmark = pytest.mark.gpu
HIDDEN, TOPK, PER_RANK = 256, 4, 8
# Checks of dispatch and combine whose calls have few tokens, mostly.
CHECKS = [c for c in conformance.CHECKS if c.ops <= ROUND_TRIP]


def _open(**options):
    return jax_ep.Group.open(make_mesh(len(jax.devices("gpu"))), "ep", **options)


@pytest.fixture(scope="module")
def group():
    with _open(name="few", timeout=120.0) as opened:
        assert "of up to 128 tokens" in opened.info().low_latency
        yield opened


@pytest.mark.parametrize("check", CHECKS, ids=str)
def test_plain_calls_of_few_tokens_pass_the_suite(group, check):
    check(group, "cuda")


def _random_ids(key, num_tokens, num_experts):
    scores = jax.random.uniform(key, (num_tokens, num_experts))
    ids = jax.lax.top_k(scores, TOPK)[1].astype(jnp.int32)
    is_masked = jax.random.bernoulli(jax.random.fold_in(key, 1), 0.2, ids.shape)
    return jnp.where(is_masked, -1, ids)


def _step(group, x, ids, layout, mode):
    """Returns the combined rows of one step, and what they must be: x, once for each row sent."""
    num_experts = PER_RANK * group.num_ranks
    if mode == "low_latency":
        out = jax_ep.low_latency_dispatch(
            x, ids, group=group, num_experts=num_experts, max_tokens_per_rank=64, layout=layout
        )
        y = jax_ep.low_latency_combine(out.x, out.handle)
    else:
        capacity = x.shape[0] * group.num_ranks * (1 if layout == "rank" else TOPK)
        out = jax_ep.dispatch(
            x, ids, group=group, num_experts=num_experts, layout=layout, recv_capacity=capacity
        )
        y = jax_ep.combine(out.x, out.handle)
    if layout == "rank":
        to = jnp.where(ids >= 0, ids // PER_RANK, -1)[:, :, None]
        count = jnp.any(to == jnp.arange(group.num_ranks), axis=1).sum(axis=1)
    else:
        count = (ids >= 0).sum(axis=1)
    return y, x * count[:, None].astype(x.dtype)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("num_steps", [2_000, pytest.param(200_000, marks=pytest.mark.slow)])
def test_many_steps_give_right_values(group, num_steps):
    """Routings, layouts and the number of tokens change; all calls share the room.

    A step is five round trips, as in five decoding steps; the slow case has a million.
    """

    def run(x):
        rank = jax.lax.axis_index("ep")

        def step(carry, key):
            x, num_wrong = carry
            key = jax.random.fold_in(key, rank)
            cases = [(1, "rank", "low_latency"), (7, "expert", "low_latency")]
            cases += [(32, "batched", "low_latency"), (32, "rank", "plain"), (5, "expert", "plain")]
            for i, (num_tokens, layout, mode) in enumerate(cases):
                few = x[:num_tokens]
                ids = _random_ids(
                    jax.random.fold_in(key, i), num_tokens, PER_RANK * group.num_ranks
                )
                y, expected = _step(group, few, ids, layout, mode)
                num_wrong += jnp.sum(y != expected)
            return ((x + 1) % 64, num_wrong), None

        keys = jax.random.split(jax.random.key(0), num_steps)
        zero = jax.lax.pcast(jnp.int32(0), "ep", to="varying")
        return jax.lax.scan(step, (x, zero), keys)[0][1]

    x = np.arange(group.num_ranks * 32 * HIDDEN, dtype=np.float32).reshape(-1, 32, HIDDEN) % 61
    num_wrong = on_ranks(run, group.mesh)(x)
    group.check(num_wrong)
    assert np.asarray(num_wrong).tolist() == [0] * group.num_ranks


def test_epochs_wrap_around_without_harm():
    with _open(name="wraps") as group:
        x = np.arange(group.num_ranks * 16 * HIDDEN, dtype=np.float32).reshape(-1, 16, HIDDEN)
        ids = np.random.default_rng(0).integers(
            -1, PER_RANK * group.num_ranks, (group.num_ranks, 16, TOPK)
        )

        def run(x, ids):
            for i in range(8):
                layout = ("rank", "expert", "batched")[i % 3]
                y, expected = _step(group, x, ids, layout, "low_latency")
                x = jnp.where(y == expected, x, jnp.nan)
                x = jax_ep.all_reduce(x, group=group, algorithm="low_latency") / group.num_ranks
            return x

        step = on_ranks(run, group.mesh, check_vma=False)
        expected = np.asarray(step(x, ids.astype(np.int32)))
        assert not np.isnan(expected).any()
        group._native_group.handle.set_epoch(2**32 - 20)
        for _ in range(3):
            assert_same_bits(step(x, ids.astype(np.int32)), expected)


@pytest.mark.parametrize("layout", ["rank", "expert", "batched"])
def test_a_missing_peer_ends_in_an_exception(layout):
    """The exception names the missing rank, results are NaN, and the group opens again."""
    if len(jax.devices("gpu")) < 2:
        pytest.skip("needs two GPUs")
    group = _open(name="failing", timeout=1.0)
    x = np.ones((group.num_ranks, 4, HIDDEN), np.float32)
    ids = np.tile(np.arange(TOPK, dtype=np.int32) * 3, (group.num_ranks, 4, 1))
    step = on_ranks(lambda x, ids: _step(group, x, ids, layout, "low_latency")[0], group.mesh)
    good = np.asarray(step(x, ids))
    group.check()
    group._native_group.handle.skip_rank(1)
    start = time.monotonic()
    y = step(x, ids)
    with pytest.raises(jax_ep.PeerTimeoutError, match="waited for rank 1") as caught:
        group.check()
    assert time.monotonic() - start < group.timeout + 1.0
    assert caught.value.op == "low_latency_dispatch"
    assert np.isnan(np.asarray(y)).all()
    group.close()
    with _open(name="failing", timeout=5.0) as again:
        np.testing.assert_array_equal(step(x, ids), good)
        again.check()


def test_ranks_at_different_calls_are_an_error():
    """One rank dispatches and the other combines: both end, and the devices still work."""
    if len(jax.devices("gpu")) < 2:
        pytest.skip("needs two GPUs")
    group = _open(name="differs", timeout=5.0)
    x = np.ones((group.num_ranks, 4, HIDDEN), np.float32)
    ids = np.zeros((group.num_ranks, 4, 1), np.int32)

    def run(x, ids):
        send = partial(
            jax_ep.low_latency_dispatch,
            group=group,
            num_experts=PER_RANK * group.num_ranks,
            max_tokens_per_rank=4,
            layout="rank",
        )
        handle = send(x, ids).handle
        rows = jnp.ones((4 * group.num_ranks, HIDDEN), x.dtype)
        return jax.lax.cond(
            jax.lax.axis_index("ep") == 0,
            lambda: send(x, ids).x[:4],
            lambda: jax_ep.low_latency_combine(rows, handle),
        )

    start = time.monotonic()
    y = on_ranks(run, group.mesh, check_vma=False)(x, ids)
    with pytest.raises(jax_ep.JaxEpError):
        group.check(y)
    assert time.monotonic() - start < 60.0
    group.close()


def test_too_little_room_is_an_error_with_both_numbers():
    with _open(name="small", low_latency_bytes=1 << 20) as group:
        x = np.ones((group.num_ranks, 64, 4096), np.float32)
        ids = np.zeros((group.num_ranks, 64, 1), np.int32)

        def run(x, ids):
            return _step(group, x, ids, "rank", "low_latency")[0]

        with pytest.raises(
            jax_ep.ConfigError, match=r"sends \d+ bytes to another, and the group has room for \d+"
        ):
            on_ranks(run, group.mesh)(x, ids)
        # A plain dispatch needs no such room.
        y, expected = on_ranks(partial(_step, group, layout="rank", mode="plain"), group.mesh)(
            x, ids
        )
        np.testing.assert_array_equal(y, expected)
    with _open(name="none", low_latency_bytes=0) as group:
        x = np.ones((group.num_ranks, 4, HIDDEN), np.float32)
        ids = np.zeros((group.num_ranks, 4, 1), np.int32)
        y, expected = on_ranks(partial(_step, group, layout="rank", mode="plain"), group.mesh)(
            x, ids
        )
        np.testing.assert_array_equal(y, expected)
