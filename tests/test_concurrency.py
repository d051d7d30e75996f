"""Many calls at once, in programs where XLA chooses their order. A hang ends in the timeout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

import jax_ep
from jax_ep.testing.ranks import make_mesh, on_ranks

pytestmark = pytest.mark.dealt

NUM_RANKS, NUM_TOKENS, HIDDEN, NUM_TOPK, NUM_EXPERTS = 8, 16, 64, 3, 16


def _ids(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    scores = rng.random((NUM_RANKS, NUM_TOKENS, NUM_EXPERTS))
    return np.argsort(scores, axis=-1)[..., :NUM_TOPK].astype(np.int32)


def _x(seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(-8, 9, (NUM_RANKS, NUM_TOKENS, HIDDEN)).astype(np.float32)


def _round_trip(x, ids, group):
    """Returns x times the number of distinct ranks of each token's experts; exact on integers."""
    out = jax_ep.dispatch(x, ids, group=group, num_experts=NUM_EXPERTS)
    return jax_ep.combine(out.x, out.handle)


def _num_ranks(ids, num_ranks=NUM_RANKS):
    """Returns [..., T, 1], the number of distinct ranks of each token."""
    rank = ids // (NUM_EXPERTS // num_ranks)
    return (rank[..., None] == np.arange(num_ranks)).any(axis=-2).sum(axis=-1, keepdims=True)


def test_64_independent_calls_mixed_with_psums_meet(groups):
    group = groups(NUM_RANKS)

    def fn(x, ids):
        calls = [_round_trip(x * (i + 1), (ids + i) % NUM_EXPERTS, group) for i in range(64)]
        sums = [jax.lax.psum(x * (i + 1), "ep") for i in range(64)]
        return calls, sums

    run = on_ranks(fn, group.mesh)
    x, ids = _x(), _ids(0)
    for _ in range(5):
        calls, sums = run(x, ids)
        for i, (y, s) in enumerate(zip(calls, sums, strict=True)):
            np.testing.assert_array_equal(y, x * (i + 1) * _num_ranks((ids + i) % NUM_EXPERTS))
            np.testing.assert_array_equal(s[0], x.sum(axis=0) * (i + 1))


def test_micro_batches_through_one_inner_jit_are_told_apart(groups):
    """JAX caches the inner lowering, so the three calls differ only in their place."""
    group = groups(NUM_RANKS)

    @jax.jit
    def layer(x, ids):
        return _round_trip(x, ids, group) + jax.lax.psum(x, "ep") * 0

    def fn(x0, x1, x2, i0, i1, i2):
        return layer(x0, i0), layer(x1, i1), layer(x2, i2)

    run = on_ranks(fn, group.mesh)
    xs, ids = [_x(s) for s in range(3)], [_ids(s) for s in range(3)]
    for _ in range(20):
        for y, x, i in zip(run(*xs, *ids), xs, ids, strict=True):
            np.testing.assert_array_equal(y, x * _num_ranks(i))


def test_two_interleaved_groups_meet():
    mesh = make_mesh(NUM_RANKS)
    with (
        jax_ep.Group.open(mesh, "ep", name="a") as a,
        jax_ep.Group.open(mesh, "ep", name="b") as b,
    ):

        def fn(x, ids):
            ys = [_round_trip(x * (k + 1), ids, (a, b)[k % 2]) for k in range(16)]
            return ys, jax.lax.psum(x, "ep")

        run = on_ranks(fn, mesh)
        x, ids = _x(), _ids(0)
        for _ in range(10):
            ys, _ = run(x, ids)
            for k, y in enumerate(ys):
                np.testing.assert_array_equal(y, x * (k + 1) * _num_ranks(ids))


def test_ten_programs_in_flight_give_right_values(groups):
    group = groups(NUM_RANKS)

    def fn(x, ids, k):
        y = _round_trip(x * k, ids, group)
        return y + jax.lax.psum(x, "ep") * 0

    run = on_ranks(fn, group.mesh)
    x, ids = _x(), _ids(0)
    factors = [np.full((NUM_RANKS, 1, 1), k, np.float32) for k in range(10)]
    for _ in range(5):
        for k, y in enumerate([run(x, ids, f) for f in factors]):
            np.testing.assert_array_equal(y, x * k * _num_ranks(ids))


def test_slices_do_not_wait_for_each_other():
    """Two slices of one group have their own routings and values."""
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "ep"))
    with jax_ep.Group.open(mesh, "ep") as group:
        run = on_ranks(lambda x, i: _round_trip(x, i, group), mesh)
        x, ids = _x(), _ids(0)
        for _ in range(20):
            np.testing.assert_array_equal(run(x, ids), x * _num_ranks(ids, 4))


@pytest.mark.parametrize("num_calls", [10_000])
def test_many_calls_with_changing_routings_give_right_values(groups, num_calls):
    """One launch makes 10,000 calls at one call site; every result is checked on the device."""
    group = groups(NUM_RANKS)

    def fn(x, key_data):
        def step(num_wrong, key):
            scores = jax.random.uniform(key, (NUM_TOKENS, NUM_EXPERTS))
            ids = jnp.argsort(scores, axis=-1)[:, :NUM_TOPK].astype(jnp.int32)
            rank = ids // (NUM_EXPERTS // NUM_RANKS)
            is_reached = (rank[..., None] == jnp.arange(NUM_RANKS)[None, None]).any(axis=1)
            reached = is_reached.sum(axis=-1, keepdims=True).astype(x.dtype)
            y = _round_trip(x, ids, group)
            return num_wrong + jnp.any(y != x * reached).astype(jnp.int32), None

        key = jax.random.fold_in(jax.random.wrap_key_data(key_data), jax.lax.axis_index("ep"))
        start = jax.lax.pcast(jnp.int32(0), "ep", to="varying")
        return jax.lax.scan(step, start, jax.random.split(key, num_calls))[0][None]

    keys = jnp.stack([jax.random.key_data(jax.random.key(7))] * NUM_RANKS)
    assert np.asarray(on_ranks(fn, group.mesh)(_x(), keys)).sum() == 0
