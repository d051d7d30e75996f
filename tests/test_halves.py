"""Exchanges that are sent and received apart; the conformance suite compares their values."""

import re
from contextlib import closing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoding import NUM_EXPERTS, NUM_RANKS, TOKENS, inputs, send

import jax_ep
from jax_ep._src.base import limits
from jax_ep.testing.ranks import make_mesh, on_ranks

pytestmark = pytest.mark.dealt


@pytest.fixture(scope="module")
def group():
    with jax_ep.Group.open(make_mesh(NUM_RANKS), "ep", name="halves", in_flight_bytes=64) as opened:
        yield opened


def _open(name):
    """Opens a group that may fail: it is closed without a look at its failure."""
    return closing(jax_ep.Group.open(make_mesh(NUM_RANKS), "ep", name=name, timeout=5.0))


def _send(group, x, ids, weights=None, **options):
    sizes = {"num_experts": NUM_EXPERTS, "max_tokens_per_rank": TOKENS}
    return jax_ep.low_latency_dispatch_send(x, ids, weights, group=group, **sizes, **options)


def _used(out):
    return jnp.where(out.handle.recv_src[:, None] >= 0, out.x, 0)


def _whole(group, x, ids, weights):
    out = send(group, x, ids, weights)
    return jax_ep.low_latency_combine(_used(out), out.handle, weights=out.weights)


def test_another_program_receives(group):
    """An exchange in flight is data, also between programs."""
    start = on_ranks(lambda *own: _send(group, *own, through={"x": own[0]}), group.mesh)
    finish = on_ranks(lambda sent: _used(jax_ep.low_latency_dispatch_recv(sent)), group.mesh)
    for seed in range(3):
        own = inputs(seed)
        sent = start(*own)
        assert sent.number.shape == (NUM_RANKS, 2)
        np.testing.assert_array_equal(sent.through["x"], own[0])
        expected = on_ranks(lambda *own: _used(send(group, *own)), group.mesh)(*own)
        np.testing.assert_array_equal(finish(sent), expected)
    group.check()


def test_exchanges_in_flight_cross_cond(group):
    def run(x, ids, weights, flag):
        sent = jax.lax.cond(
            flag[0], lambda: _send(group, x, ids, weights), lambda: _send(group, -x, ids, weights)
        )
        out = jax_ep.low_latency_dispatch_recv(sent)
        back = jax_ep.low_latency_combine_send(_used(out), out.handle, weights=out.weights)
        return jax_ep.low_latency_combine_recv(back)

    own = inputs()
    expected = on_ranks(lambda *own: _whole(group, *own), group.mesh)(*own)
    run = on_ranks(run, group.mesh, check_vma=False)
    for sign in (True, False):
        y = run(*own, np.full((NUM_RANKS, 1), sign))
        np.testing.assert_array_equal(y, expected if sign else -expected)


def _calls(text):
    """Returns what the compiled program calls, in its order."""
    found = []
    for line in text[text.index("ENTRY ") :].splitlines():
        target = re.search(r'custom_call_target="jax_ep\.(\w+)"', line)
        if target is not None:
            found.append(target[1])
        elif re.search(r"[ )](dot|fusion|call)\(.*dot_general", line):
            found.append("matmul")
    return found


def test_data_orders_the_halves_and_what_lies_between(group):
    def run(x, ids, weights):
        sent = _send(group, x, ids, weights, through=x)
        between = sent.through @ sent.through.T
        return _used(jax_ep.low_latency_dispatch_recv(sent, after=between)), between

    compiled = jax.jit(on_ranks(run, group.mesh)).lower(*inputs()).compile()
    assert _calls(compiled.as_text()) == ["dispatch_send", "matmul", "dispatch_recv"]


@pytest.mark.parametrize("backend", ["cpu", "xla"])
def test_a_bias_is_added_where_the_sums_arrive(group, backend):
    def run(x, ids, weights):
        out = send(group, x, ids, weights, backend=backend)
        options = {"weights": out.weights, "backend": backend}
        back = jax_ep.low_latency_combine_send(_used(out), out.handle, through=x, **options)
        whole = jax_ep.low_latency_combine(_used(out), out.handle, bias=x * 3, **options)
        return jax_ep.low_latency_combine_recv(back, bias=back.through * 3), whole

    y, whole = on_ranks(run, group.mesh)(*inputs())
    np.testing.assert_array_equal(y, whole)


def test_one_more_in_flight_is_an_error():
    with _open("third") as group:

        def run(*own):
            first = _send(group, *own)
            second = _send(group, *own, after=first.number)
            third = _send(group, *own, after=second.number)
            return jax_ep.low_latency_dispatch_recv(first, after=third.number).x

        x = jax.block_until_ready(on_ranks(run, group.mesh)(*inputs()))
        with pytest.raises(jax_ep.GroupError) as caught:
            group.check()
        message = str(caught.value)
        assert message.startswith("low_latency_dispatch_send: rank ")
        assert "sent exchange number 3 while 2 were in flight" in message
        assert np.isnan(x).all()


def test_an_exchange_is_received_once():
    with _open("twice") as group:

        def run(x, ids, weights):
            out = send(group, x, ids, weights)
            back = jax_ep.low_latency_combine_send(_used(out), out.handle)
            first = jax_ep.low_latency_combine_recv(back)
            return first, jax_ep.low_latency_combine_recv(back, after=first)

        _, second = on_ranks(run, group.mesh)(*inputs())
        jax.block_until_ready(second)
        with pytest.raises(jax_ep.GroupError, match=r"low_latency_combine_recv: rank .* not in fl"):
            group.check()
        assert np.isnan(second).all()


def test_an_exchange_ends_with_its_group():
    with _open("again") as group:
        sent = on_ranks(lambda *own: _send(group, *own), group.mesh)(*inputs())
        jax.block_until_ready(sent)
    with pytest.raises(jax_ep.GroupError, match=r"low_latency_dispatch_recv: .* not open"):
        on_ranks(jax_ep.low_latency_dispatch_recv, group.mesh)(sent)
    with _open("again") as fresh:
        jax.block_until_ready(on_ranks(jax_ep.low_latency_dispatch_recv, fresh.mesh)(sent))
        with pytest.raises(jax_ep.GroupError, match="not in flight"):
            fresh.check()


WRONG = {
    "kind": (
        lambda sent, out: jax_ep.low_latency_combine_recv(sent),
        "low_latency_combine_recv: in_flight must be the result of low_latency_combine_send, got "
        "that of low_latency_dispatch_send",
    ),
    "type": (
        lambda sent, out: jax_ep.low_latency_dispatch_recv(out),
        "low_latency_dispatch_recv: in_flight must be the result of low_latency_dispatch_send, got "
        "Dispatched",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_arguments_are_named(group, wrong):
    call, message = WRONG[wrong]

    def run(x, ids, weights):
        call(_send(group, x, ids, weights), send(group, x, ids, weights))

    with pytest.raises(jax_ep.ConfigError, match=re.escape(message)):
        jax.eval_shape(on_ranks(run, group.mesh), *inputs())


def _loss(group, half):
    """Returns a function of rows whose gradient passes one half."""

    def loss(x, ids, weights):
        if half == "dispatch_send":
            return _send(group, x, ids, through=x).through.sum()[None]
        sent = _send(group, jax.lax.stop_gradient(x) if "combine" in half else x, ids, weights)
        out = jax_ep.low_latency_dispatch_recv(sent)
        if half == "dispatch_recv":
            return out.x.sum()[None]
        rows = out.x * x[0, 0]
        back = jax_ep.low_latency_combine_send(rows, out.handle, through=rows)
        y = back.through if half == "combine_send" else jax_ep.low_latency_combine_recv(back)
        return y.sum()[None]

    return on_ranks(loss, group.mesh)


@pytest.mark.parametrize(
    "half", [f"{e}_{h}" for e in ("dispatch", "combine") for h in ("send", "recv")]
)
def test_gradients_are_refused(group, half):
    message = f"low_latency_{half} cannot be differentiated; use jax_ep.{half.split('_')[0]}"
    x, ids, weights = inputs()
    with pytest.raises(jax_ep.ConfigError, match=message):
        jax.eval_shape(jax.grad(lambda x: _loss(group, half)(x, ids, weights).sum()), x)


def test_batches_are_refused(group):
    def run(x, ids):
        jax.vmap(lambda x: _send(group, x, ids).number)(jnp.stack([x, x, x]))

    message = "low_latency_dispatch_send: jax.vmap is not supported"
    with pytest.raises(jax_ep.ConfigError, match=message):
        jax.eval_shape(on_ranks(run, group.mesh), *inputs()[:2])


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
def test_the_computed_room_holds_an_exchange(num_ranks):
    sizes = {"max_tokens_per_rank": 128, "hidden": 7168, "num_topk": 8, "num_ranks": num_ranks}
    needed = jax_ep.in_flight_bytes(**sizes)
    assert needed == 2 * jax_ep.low_latency_bytes(**sizes)
    payload = limits.low_latency_payload(128, 8, [7168 * 2])
    assert limits.in_flight_room(num_ranks, needed) == payload
    assert limits.in_flight_room(num_ranks, needed - 1) < payload


def test_the_group_keeps_its_room():
    with pytest.raises(jax_ep.ConfigError, match=re.escape("Group.open: in_flight_bytes must be")):
        jax_ep.Group.open(make_mesh(NUM_RANKS), "ep", name="wrong", in_flight_bytes=-1)
    mesh = make_mesh(NUM_RANKS)
    with jax_ep.Group.open(mesh, "ep", name="sized", in_flight_bytes=1 << 20) as opened:
        assert opened.in_flight_bytes == 1 << 20
        assert opened.info().in_flight == "a receive makes the whole exchange"
        with pytest.raises(jax_ep.GroupError, match="in_flight_bytes=1048576, wanted 0"):
            jax_ep.Group.get(mesh, "ep", name="sized", in_flight_bytes=0)
