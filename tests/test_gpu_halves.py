"""Exchanges that are sent and received apart, on NVIDIA GPUs: pytest -m gpu."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_ep
from jax_ep.testing.clock import read_clock
from jax_ep.testing.conformance.halves import CHECKS
from jax_ep.testing.ranks import make_mesh, on_ranks, place

pytestmark = pytest.mark.gpu
TOKENS, TOPK, HIDDEN, PER_RANK = 16, 3, 1024, 4
ROOM = 64 << 20


def _open(name, **options):
    mesh = make_mesh(len(jax.devices("gpu")))
    return jax_ep.Group.open(mesh, "ep", name=name, **{"in_flight_bytes": ROOM, **options})


@pytest.fixture(scope="module")
def group():
    with _open("halves", timeout=60.0) as opened:
        assert opened.info().in_flight.startswith("usable")
        yield opened


@pytest.mark.parametrize("check", CHECKS, ids=str)
def test_halves_pass_the_suite(group, check):
    check(group, "cuda")


def _inputs(num_ranks, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((num_ranks, TOKENS, HIDDEN)).astype(jnp.bfloat16)
    scores = rng.random((num_ranks, TOKENS, num_ranks * PER_RANK))
    return x, np.argsort(scores, axis=-1)[..., :TOPK].astype(np.int32)


def _sizes(group):
    return {
        "group": group,
        "num_experts": PER_RANK * group.num_ranks,
        "max_tokens_per_rank": TOKENS,
    }


def _whole(group, x, ids):
    out = jax_ep.low_latency_dispatch(x, ids, **_sizes(group))
    return jax_ep.low_latency_combine(_experts(out), out.handle)


def _experts(out):
    return jnp.where(out.handle.recv_src[:, None] >= 0, out.x * 2, 0)


def _halves(group, x, ids, between):
    sent = jax_ep.low_latency_dispatch_send(x, ids, through=x, **_sizes(group))
    out = jax_ep.low_latency_dispatch_recv(sent, after=between(sent.through))
    back = jax_ep.low_latency_combine_send(_experts(out), out.handle, through=x)
    return jax_ep.low_latency_combine_recv(back, after=between(back.through))


@pytest.mark.parametrize("layout", ["captured", "launched"])
def test_many_steps_give_the_bits_of_whole_exchanges(group, layout):
    """Among sums and whole exchanges, with a rank that is late in turn; also replayed."""
    num_steps = 50

    def run(step):
        def body(carry, i):
            x, ids = carry
            is_late = i % group.num_ranks == jax.lax.axis_index("ep")
            delay_us = jnp.where(is_late, 200, 0).astype(jnp.int32)[None]
            _, _, (x,) = read_clock(delay_us, (x,))
            y = step(x, ids)
            total = jax_ep.all_reduce(y[:1].astype(jnp.float32), group=group)
            return (x + (y / 64).astype(x.dtype), ids), (y, total)

        return lambda x, ids: jax.lax.scan(body, (x, ids), jnp.arange(num_steps))[1]

    def halved(x, ids):
        return _halves(group, x, ids, lambda a: a.astype(jnp.float32) @ jnp.ones((HIDDEN, 64)))

    own = place(_inputs(group.num_ranks), group.mesh)
    options = {"xla_gpu_enable_command_buffer": ""} if layout == "launched" else {}

    def compiled(fn):
        mapped = jax.jit(on_ranks(fn, group.mesh, check_vma=False))
        return mapped.lower(*own).compile(compiler_options=options)

    expected = compiled(run(lambda x, ids: _whole(group, x, ids)))(*own)
    ours = compiled(run(halved))
    for _ in range(4):  # command buffers are captured after some launches
        for got, wanted in zip(ours(*own), expected, strict=True):
            np.testing.assert_array_equal(
                np.asarray(got).view(np.uint8), np.asarray(wanted).view(np.uint8)
            )
    group.check()


def test_numbers_of_flights_wrap(group):
    own = place(_inputs(group.num_ranks), group.mesh)
    whole = on_ranks(lambda *own: _whole(group, *own), group.mesh)(*own)
    halves = on_ranks(lambda *own: _halves(group, *own, lambda a: a), group.mesh)
    jax.block_until_ready(whole)
    group._native_group.handle.set_epoch(0xFFFFFFF6)
    for _ in range(12):
        np.testing.assert_array_equal(np.asarray(halves(*own)), np.asarray(whole))
    group.check()


def test_a_third_in_flight_is_recorded():
    group = _open("third", timeout=5.0)

    def run(x, ids):
        first = jax_ep.low_latency_dispatch_send(x, ids, **_sizes(group))
        second = jax_ep.low_latency_dispatch_send(x, ids, after=first.number, **_sizes(group))
        third = jax_ep.low_latency_dispatch_send(x, ids, after=second.number, **_sizes(group))
        return jax_ep.low_latency_dispatch_recv(first, after=third.number).x

    x = jax.block_until_ready(on_ranks(run, group.mesh)(*_inputs(group.num_ranks)))
    with pytest.raises(jax_ep.GroupError, match="sent exchange number 3 while 2 were in flight"):
        group.check()
    assert np.isnan(np.asarray(x, np.float32)).all()
    group.close()


def test_an_exchange_that_was_received_is_not_in_flight():
    group = _open("twice", timeout=5.0)
    start = on_ranks(
        lambda *own: jax_ep.low_latency_dispatch_send(*own, **_sizes(group)), group.mesh
    )
    finish = on_ranks(lambda sent: jax_ep.low_latency_dispatch_recv(sent).x, group.mesh)
    sent = start(*_inputs(group.num_ranks))
    jax.block_until_ready(finish(sent))
    group.check()
    again = jax.block_until_ready(finish(sent))
    with pytest.raises(jax_ep.GroupError, match=r"low_latency_dispatch_recv: .* not in flight"):
        group.check()
    assert np.isnan(np.asarray(again, np.float32)).all()
    group.close()


def test_a_peer_that_sends_nothing_is_named():
    if len(jax.devices("gpu")) < 2:
        pytest.skip("needs two GPUs")
    group = _open("missing", timeout=1.0)
    step = on_ranks(lambda *own: _halves(group, *own, lambda a: a), group.mesh)
    own = _inputs(group.num_ranks)
    jax.block_until_ready(step(*own))
    group._native_group.handle.skip_rank(1)
    jax.block_until_ready(step(*own))
    with pytest.raises(jax_ep.PeerTimeoutError) as caught:
        group.check()
    assert caught.value.op == "low_latency_dispatch_recv"
    assert caught.value.peer == 1
    group.close()
    with _open("missing", timeout=20.0) as fresh:  # the same memory, with no flight under way
        y = jax.block_until_ready(step(*own))
        assert not np.isnan(np.asarray(y, np.float32)).any()
        fresh.check()


def test_too_little_room_is_told():
    with _open("none", in_flight_bytes=0) as group:
        send = on_ranks(
            lambda *own: jax_ep.low_latency_dispatch_send(*own, **_sizes(group)).number, group.mesh
        )
        own = _inputs(group.num_ranks)
        with pytest.raises(jax_ep.ConfigError, match="has room for 0: open it with in_flight_byt"):
            jax.eval_shape(send, *own)
