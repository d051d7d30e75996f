"""The all_reduce family on NVIDIA GPUs: JAX_PLATFORMS=cuda,cpu pytest -m gpu."""

import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_ep
from jax_ep import reference
from jax_ep._src.base import exact, limits, tables
from jax_ep.testing.compare import assert_close, assert_same_bits
from jax_ep.testing.ranks import make_mesh, on_ranks

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def group():
    with jax_ep.Group.open(make_mesh(len(jax.devices())), "ep", timeout=60.0) as opened:
        yield opened


SIZES = (1, 50, 2049, 8192, 40_000, 1_100_000)  # the last is read in place


def _calls(group):
    """Returns (size, call) for each algorithm on parts of one vector.

    The parts are concatenated, not set in place: XLA of JAX 0.11.2 crashed when it compiled that in
    a scan.
    """
    call = partial(jax_ep.all_reduce, group=group, allow_psum=False)
    return [
        (size, lambda x, s=size, a=algorithm: jnp.concatenate([call(x[:s], algorithm=a), x[s:]]))
        for size in SIZES
        for algorithm in ("low_latency", "one_shot", "two_shot")
        if algorithm != "low_latency" or size < SIZES[-1]
    ]


@pytest.mark.timeout(280)
def test_many_calls_of_random_size_and_algorithm_give_right_sums(group):
    """A loop makes 100,000 calls. XLA reuses memory: each result is the next call's operand."""
    num_ranks, steps = group.num_ranks, 1000
    calls = _calls(group)
    order = np.random.default_rng(0).integers(0, len(calls), 100)

    def run(x):
        rank = jax.lax.axis_index("ep")

        def step(carry, _):
            x, num_wrong = carry
            for i in order:
                size, call = calls[i]
                y = call(x + rank)
                total = x[:size] * num_ranks + num_ranks * (num_ranks - 1) // 2
                expected = jnp.concatenate([total, x[size:] + rank])
                num_wrong += jnp.sum(y != expected)
                x = (x + 1) % 1000
            return (x, num_wrong), None

        return jax.lax.scan(step, (x, jnp.int32(0)), length=steps)[0][1]

    x = np.broadcast_to(np.arange(SIZES[-1], dtype=np.int32) % 997, (num_ranks, SIZES[-1]))
    num_wrong = on_ranks(run, group.mesh, check_vma=False)(x)
    group.check(num_wrong)
    assert np.asarray(num_wrong).tolist() == [0] * num_ranks


def _random_bits(seed, rank, size, dtype):
    """Bits of any pattern, and some vectors like those that stand for an empty slot."""
    word = jnp.dtype(f"uint{8 * jnp.dtype(dtype).itemsize}")
    place = jax.lax.iota(jnp.uint32, size)
    mixed = (place + jnp.uint32(0x9E3779B9) * seed) * jnp.uint32(0x85EBCA6B) + rank * 77777
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
        mixed = (mixed ^ mixed >> shift) * jnp.uint32(factor)
    vector = place // (16 // word.itemsize)
    kind = (vector * jnp.uint32(0xC2B2AE35) + seed * 97 + rank) >> 26  # one of 64
    absent, stand_in = jnp.uint32(0xF5F5F5F5), jnp.uint32(0xF5F5F5F4)
    is_eighth = place * word.itemsize % 16 == 8
    sentinel = jnp.where((kind == 1) & is_eighth, stand_in, absent)
    mixed = jnp.where(kind < 2, sentinel, mixed)
    return jax.lax.bitcast_convert_type(mixed.astype(word), dtype)


def _one_sum(group, index):
    """Returns a function from a seed to the number of wrong elements of a random sum."""
    rng = np.random.default_rng(index)
    movement = (jax_ep.all_reduce, jax_ep.all_reduce, jax_ep.all_gather)[index % 3]
    algorithms = ["low_latency", "one_shot", "two_shot"]
    algorithm = algorithms[rng.integers(2 if movement is jax_ep.all_gather else 3)]
    dtype = ("float32", "bfloat16", "float16", "int32")[rng.integers(4)]
    most = limits.slot_payload(group.num_ranks) if algorithm == "low_latency" else 2 << 20
    size = max(1, int(most ** rng.random()) // jnp.dtype(dtype).itemsize)

    def run(seed):
        terms = [_random_bits(seed, jnp.uint32(r), size, dtype) for r in range(group.num_ranks)]
        own = _random_bits(seed, jax.lax.axis_index("ep").astype(jnp.uint32), size, dtype)
        options = {} if movement is jax_ep.all_gather else {"allow_psum": False}
        got = movement(own, group=group, algorithm=algorithm, **options)
        if movement is jax_ep.all_gather:
            expected = jnp.stack(terms)
        elif dtype == "int32":
            expected = sum(terms[1:], terms[0])
        else:
            wide = list(exact.kept(jnp.stack(terms)).astype(jnp.float32))
            expected = exact.rounded(sum(wide[1:], wide[0]), jnp.dtype(dtype))
        word = f"uint{8 * got.dtype.itemsize}"
        same = got.view(word) == expected.view(word)
        if movement is jax_ep.all_reduce and dtype != "int32":
            same |= jnp.isnan(got) & jnp.isnan(expected)  # which NaN a sum is, is not defined
        return jnp.sum(~same)

    return run


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_100000_sums_of_random_bits_are_right(group):
    """Sizes, dtypes and algorithms are random; every pattern of bits arrives."""
    sums = [_one_sum(group, i) for i in range(50)]

    def run(first):
        def step(num_wrong, seed):
            for i, one in enumerate(sums):
                num_wrong += one(seed * 64 + i)
            return num_wrong, None

        seeds = first[0] + jnp.arange(2000, dtype=jnp.uint32)
        return jax.lax.scan(step, jnp.int32(0), seeds)[0]

    first = np.full((group.num_ranks, 1), 12345, np.uint32)
    num_wrong = on_ranks(run, group.mesh, check_vma=False)(first)
    group.check(num_wrong)
    assert np.asarray(num_wrong).tolist() == [0] * group.num_ranks


LARGE = (9 << 20) // 4 + 5  # elements of 4 bytes, too many to be pushed by any algorithm


def _scatter_and_gather(x, **options):
    size = x.shape[0] // options["group"].num_ranks * options["group"].num_ranks
    part = jax_ep.reduce_scatter(x[:size], tiled=True, **options)
    return jnp.concatenate([jax_ep.all_gather(part, tiled=True, **options), x[size:]]), size


def _fused(x, **options):
    rows = x[: x.shape[0] // 8192 * 8192].reshape(-1, 8192).astype(jnp.float32)
    _, total = jax_ep.all_reduce_residual_rmsnorm(
        rows, jnp.ones_like(rows), rows[0], eps=1e-6, **options
    )
    added = total.astype(jnp.int32).reshape(-1) - 1
    return jnp.concatenate([added, x[added.shape[0] :]]), added.shape[0]


OVERWRITTEN: dict[str, Any] = {
    "one_shot": lambda x, **options: (jax_ep.all_reduce(x, algorithm="one_shot", **options), LARGE),
    "two_shot": lambda x, **options: (jax_ep.all_reduce(x, algorithm="two_shot", **options), LARGE),
    "halves": partial(_scatter_and_gather, algorithm="one_shot"),
    "fused": partial(_fused, algorithm="one_shot"),
}


@pytest.mark.timeout(280)
@pytest.mark.parametrize("how", OVERWRITTEN)
def test_operands_are_not_overwritten_while_peers_read_them(group, how):
    """Each operand takes the memory of the last one, which a slower peer may still read."""
    num_ranks = group.num_ranks

    def run(x):
        rank = jax.lax.axis_index("ep")

        def step(carry, _):
            x, num_wrong = carry
            y, size = OVERWRITTEN[how](x + rank, group=group, allow_psum=False)
            total = x[:size] * num_ranks + num_ranks * (num_ranks - 1) // 2
            num_wrong += jnp.sum(y[:size] != total)
            return ((x + 1) % 1000, num_wrong), None

        return jax.lax.scan(step, (x, jnp.int32(0)), length=500)[0][1]

    x = np.broadcast_to(np.arange(LARGE, dtype=np.int32) % 997, (num_ranks, LARGE))
    num_wrong = on_ranks(run, group.mesh, check_vma=False)(x)
    group.check(num_wrong)
    assert np.asarray(num_wrong).tolist() == [0] * num_ranks


def test_calls_in_a_row_share_memory_without_harm(group):
    """A captured program makes all calls three times; its input is donated."""
    calls = _calls(group) * 3

    def run(x):
        for _, call in calls:
            x = call(x) % 1000
        return x

    x = np.random.default_rng(1).integers(0, 100, (group.num_ranks, SIZES[-1])).astype(np.int32)
    expected = x
    for size in SIZES * 3:
        for _ in range(3 if size < SIZES[-1] else 2):
            total = expected.copy()
            total[:, :size] = np.sum(expected[:, :size], axis=0)
            expected = total % 1000
    step = jax.jit(on_ranks(run, group.mesh, check_vma=False), donate_argnums=0)
    for _ in range(3):
        assert_same_bits(step(jnp.asarray(x)), expected)


def test_algorithms_give_the_same_bits(group):
    """Sizes are one element around the limits of low_latency and of pushed arrays."""
    payloads = (limits.slot_payload, limits.push_payload, limits.two_shot_payload)
    limits_here = [payload(group.num_ranks) for payload in payloads]
    for limit in limits_here:
        for size in (limit // 2 - 1, limit // 2, limit // 2 + 1):
            x = np.random.default_rng(size).standard_normal((group.num_ranks, size))
            x = x.astype(jnp.bfloat16)
            expected = reference.all_reduce(x)
            for algorithm in ("low_latency", "one_shot", "two_shot", "auto"):
                if algorithm == "low_latency" and size * 2 > limits_here[0]:
                    continue
                call = partial(
                    jax_ep.all_reduce, group=group, algorithm=algorithm, allow_psum=False
                )
                got = on_ranks(call, group.mesh, check_vma=False)(x)
                assert_same_bits(got, expected, what=f"{algorithm} {size}")


@pytest.mark.parametrize("op", tables.OPS)
def test_auto_keeps_the_bits_around_the_thresholds_of_the_table(group, op):
    """One element or row around a threshold, "auto" has the bits of another algorithm."""
    is_norm = op == "all_reduce_residual_rmsnorm"
    unit = 8192 if is_norm else 1
    call = partial(getattr(jax_ep, op), group=group, allow_psum=False)
    for step in group.tuning[op][:-1]:
        for more in (-1, 0, 1):
            count = (step.bytes // (2 * unit) + more) * unit
            rows = (count // unit, unit) if is_norm else (count,)
            ranks = (group.num_ranks,) * (2 if op == "reduce_scatter" else 1)
            rng = np.random.default_rng(count)
            operands = [rng.standard_normal((*ranks, *rows)).astype(jnp.bfloat16)]
            if is_norm:
                shared = [rng.standard_normal(rows), rng.random(unit)]
                shared = [a.astype(jnp.bfloat16) for a in shared]
                operands += [np.broadcast_to(a, (group.num_ranks, *a.shape)) for a in shared]
            results = [
                on_ranks(partial(call, algorithm=algorithm), group.mesh, check_vma=False)(*operands)
                for algorithm in ("auto", "one_shot")
            ]
            group.check(results)
            if is_norm:  # blocks of other sizes add up squares in another order
                (normed, got), (of_another, expected) = results
                assert_close(normed, of_another, tolerance=1e-2)
            else:
                got, expected = results
            assert_same_bits(got, expected, what=f"{op} {rows}")


@pytest.mark.parametrize("dtype", ["int32", "float32", "bfloat16"])
def test_payloads_that_look_like_flags_are_summed_right(dtype):
    """The payload holds every word that an epoch of these calls could be."""
    first, count = 5000, 256  # epochs that no call of the group has had
    with jax_ep.Group.open(make_mesh(len(jax.devices())), "ep", name="flags") as group:
        words = np.arange(first - 8, first + count, dtype=np.uint32).view(jnp.dtype(dtype))
        x = np.stack([np.roll(words, 16 * r) for r in range(group.num_ranks)])
        group._native_group.handle.set_epoch(first)

        def run(x):
            call = partial(jax_ep.all_reduce, group=group, allow_psum=False)
            algorithms = ("low_latency", "one_shot", "two_shot") * 16
            return [call(x, algorithm=algorithm) for algorithm in algorithms]

        expected = reference.all_reduce(x)
        for got in on_ranks(run, group.mesh, check_vma=False)(x):
            assert_same_bits(got, expected)


def test_too_large_for_packets_is_an_error(group):
    size = limits.slot_payload(group.num_ranks) // 4 + 1
    call = partial(jax_ep.all_reduce, group=group, algorithm="low_latency")
    with pytest.raises(jax_ep.ConfigError, match="algorithm='low_latency' takes at most"):
        on_ranks(call, group.mesh, check_vma=False)(np.ones((group.num_ranks, size), np.float32))


def test_epochs_wrap_around_without_harm():
    """The epochs of all operations of a group wrap around."""
    with jax_ep.Group.open(make_mesh(len(jax.devices())), "ep", name="wraps") as group:
        num_ranks = group.num_ranks

        def run(x, ids):
            for i in range(8):
                for algorithm in ("low_latency", "one_shot", "two_shot"):
                    call = partial(jax_ep.all_reduce, group=group, algorithm=algorithm)
                    x = call(x[: x.shape[0] - i % 2]) / num_ranks
                    x = jnp.concatenate([x, x[: 16 - x.shape[0]]])
                out = jax_ep.dispatch(x, ids, group=group, num_experts=num_ranks)
                x = jax_ep.combine(out.x, out.handle)
            return x

        x = np.broadcast_to(np.arange(16.0, dtype=np.float32)[:, None], (num_ranks, 16, 64))
        ids = np.zeros((num_ranks, 16, 1), np.int32) + np.arange(num_ranks)[:, None, None]
        step = on_ranks(run, group.mesh, check_vma=False)
        expected = np.asarray(step(x, ids.astype(np.int32)))
        assert not np.isnan(expected).any()
        group._native_group.handle.set_epoch(2**32 - 20)
        for _ in range(3):
            assert_same_bits(step(x, ids.astype(np.int32)), expected)


# Small arrays are pushed to the peers, large arrays are read in place.
WAYS = [
    ("low_latency", 5000),
    ("one_shot", 5000),
    ("two_shot", 5000),
    ("one_shot", 2_500_000),
    ("two_shot", 2_500_000),
]


@pytest.mark.parametrize(("algorithm", "size"), WAYS)
def test_ranks_at_different_calls_are_an_error(algorithm, size):
    """The calls have one size, so only their names tell them apart."""
    num_ranks = len(jax.devices())
    if num_ranks < 2:
        pytest.skip("needs two GPUs")
    group = jax_ep.Group.open(make_mesh(num_ranks), "ep", name="diverging", timeout=5.0)
    call = partial(jax_ep.all_reduce, group=group, algorithm=algorithm)

    def diverge(x):
        def first(x):
            return call(call(x) * 2) + 1

        def second(x):
            return call(call(x + 1) * 3)

        return jax.lax.cond(jax.lax.axis_index("ep") == 0, first, second, x)

    x = np.ones((num_ranks, size), np.float32)
    y = on_ranks(diverge, group.mesh, check_vma=False)(x)
    with pytest.raises(jax_ep.GroupError, match="at another call"):
        group.check(y)
    assert np.isnan(np.asarray(y)).all()
    group.close()


@pytest.mark.parametrize(("algorithm", "size"), WAYS)
def test_a_missing_peer_ends_in_an_exception(algorithm, size):
    num_ranks = len(jax.devices())
    if num_ranks < 2:
        pytest.skip("needs two GPUs")
    group = jax_ep.Group.open(make_mesh(num_ranks), "ep", name="failing", timeout=1.0)

    def run(x):
        for _ in range(50):
            x = jax_ep.all_reduce(x, group=group, algorithm=algorithm) / num_ranks
        return x

    step = on_ranks(run, group.mesh, check_vma=False)
    x = np.ones((num_ranks, size), np.float32)
    assert_same_bits(step(x), x)
    group._native_group.handle.skip_rank(1)
    start = time.monotonic()
    y = step(x)
    with pytest.raises(jax_ep.PeerTimeoutError, match="waited for rank 1") as caught:
        group.check()
    assert time.monotonic() - start < group.timeout + 1.0
    assert np.isnan(np.asarray(y)).all()
    assert caught.value.op == "all_reduce"
    group.close()


HALVES = [
    (op, size)
    for op in ("reduce_scatter", "all_gather", "all_reduce_residual_rmsnorm")
    for size in (8192, 2_506_752)
]


@pytest.mark.parametrize(("op", "size"), HALVES)
def test_failures_name_the_operation(op, size):
    """The exception names the operation, not the kernel, which serves several operations."""
    num_ranks = len(jax.devices())
    if num_ranks < 2:
        pytest.skip("needs two GPUs")
    group = jax_ep.Group.open(make_mesh(num_ranks), "ep", name="named", timeout=1.0)
    is_norm = op == "all_reduce_residual_rmsnorm"
    shape = (size // 8192, 8192) if is_norm else (size,)
    more = [jnp.zeros(shape), jnp.ones(8192)] if is_norm else []
    call = partial(getattr(jax_ep, op), group=group, algorithm="one_shot")
    step = on_ranks(lambda x: call(x, *more), group.mesh, check_vma=False)
    parts = (num_ranks,) if op == "reduce_scatter" else ()
    x = np.ones((num_ranks, *parts, *shape), np.float32)
    group.check(step(x))
    group._native_group.handle.skip_rank(1)
    y = step(x)
    with pytest.raises(jax_ep.PeerTimeoutError, match="waited for rank 1") as caught:
        group.check()
    assert caught.value.op == op
    for result in jax.tree.leaves(y):
        assert np.isnan(np.asarray(result)).all()
    group.close()
