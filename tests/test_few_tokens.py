"""The choice between the kernels for many tokens and those for few; on CPUs, by its facts."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from decoding import NUM_EXPERTS, NUM_RANKS, TOKENS, TOPK, inputs, send

import jax_ep
from jax_ep._src.base import config, limits, native_modules
from jax_ep._src.base.group_spec import GroupSpec
from jax_ep._src.base.options import ExchangeMode, Fill, Layout
from jax_ep._src.base.spec import DispatchSpec, Route, Routes, RouteSpec, RowIndex
from jax_ep._src.ops.common import few_tokens
from jax_ep.testing.compare import assert_same_bits
from jax_ep.testing.ranks import make_mesh, on_ranks


@pytest.fixture(scope="module")
def group():
    with jax_ep.Group.open(make_mesh(NUM_RANKS), "ep", name="choice") as opened:
        yield opened


def _group_spec(**changes):
    facts = {
        "identity": "none",
        "axes": ("ep",),
        "mesh_axes": (("ep", NUM_RANKS),),
        "device_ids": (0, 1),
        "low_latency_room": 1 << 20,
        **changes,
    }
    return GroupSpec(**facts)


def _spec(kind=DispatchSpec, group=None, **changes):
    facts = {
        "group": group or _group_spec(),
        "routes": Routes(*(Route("cuda", 16),) * 3),
        "layout": Layout.RANK,
        "recv_capacity": 100_000,
        "op": "dispatch",
        "mode": ExchangeMode.LOW_LATENCY,
        "few_sms": None,
    }
    if kind is DispatchSpec:
        facts |= {"num_experts": NUM_EXPERTS, "expert_alignment": 1, "fill": Fill.ZEROS}
    return kind(**{**facts, **changes})


def _specs_of_dispatches(monkeypatch):
    """Returns a list that gets the spec of each dispatch when its kernels are chosen."""
    seen = []
    choose = few_tokens.dispatch_kernels
    monkeypatch.setattr(
        "jax_ep._src.ops.dispatch.call.dispatch_kernels",
        lambda spec, *rest: seen.append(spec) or choose(spec, *rest),
    )
    return seen


class _Table:
    """Stands for the native module of `cuda`."""

    def __init__(self, size):
        self.size = size

    def low_latency_table_bytes(self, **_):
        return self.size


# Changes of a spec, the number of tokens, and whether the kernels for few tokens carry the calls.
PLAIN: dict[str, Any] = {"mode": None, "recv_capacity": 1000}
CHOICES: dict[str, tuple[dict[str, Any], int, bool]] = {
    "low latency": ({}, 200, True),
    "throughput": ({"mode": ExchangeMode.THROUGHPUT}, 4, False),
    "few": (PLAIN, config.MAX_FEW_TOKENS, True),
    "many": (PLAIN, config.MAX_FEW_TOKENS + 1, False),
    "cpu": ({"routes": Routes(*(Route("cpu", 16),) * 3)}, 4, False),
    "no room": ({"group": _group_spec(low_latency_room=4096)}, 4, False),
    "no room, plain": ({**PLAIN, "group": _group_spec(low_latency_room=4096)}, 4, False),
    "no packets": ({"group": _group_spec(has_packets=False)}, 4, False),
    "drops": ({"recv_capacity": 7}, 4, False),
    "drops, plain": ({"mode": None, "recv_capacity": 7}, 4, False),
}


@pytest.mark.parametrize("case", CHOICES)
def test_calls_take_the_kernels_for_few_tokens_if_they_can(monkeypatch, case):
    changes, num_tokens, is_few = CHOICES[case]
    monkeypatch.setattr(native_modules, "load", lambda _: _Table(1000))
    rows = [jax.ShapeDtypeStruct((num_tokens, 64), jnp.bfloat16)]
    for sms in (None, 5):
        found = few_tokens.dispatch_kernels(_spec(few_sms=sms, **changes), (num_tokens, 2), rows)
        assert (found.mode is ExchangeMode.LOW_LATENCY) == is_few
        most = config.PLAIN_FEW_SMS if changes.get("mode", ...) is None else config.ALL_SMS
        assert found.num_sms == ((sms or most) if is_few else 16)
        if not case.startswith("drops"):
            index = RowIndex(None, jnp.zeros((num_tokens, NUM_RANKS), jnp.int32), None, None)
            spec = _spec(RouteSpec, few_sms=sms, **changes)
            assert few_tokens.combine_kernels(spec, index, rows[0]) == found


@pytest.mark.parametrize("layout", ["rank", "expert"])
@pytest.mark.parametrize("rounds", [False, True])
def test_gradients_of_plain_calls_have_what_the_kernels_need(group, monkeypatch, layout, rounds):
    """The host's handlers check what the kernels for few tokens get; they compute the same."""
    x, ids, weights = inputs()
    plain = jax_ep.dispatch_fp8 if rounds else jax_ep.dispatch
    room = NUM_RANKS * TOKENS * (1 if layout == "rank" else TOPK)

    def loss(x, weights, ids):
        out = plain(
            x, ids, weights, group=group, num_experts=NUM_EXPERTS, layout=layout, recv_capacity=room
        )
        at_rows = None if layout == "rank" else out.weights
        return jnp.sum(jax_ep.combine(out.x**2, out.handle, weights=at_rows))

    def gradients():
        return on_ranks(jax.grad(loss, argnums=(0, 1)), group.mesh)(x, weights, ids)

    expected = gradients()
    seen = []
    for module in ("dispatch", "combine"):
        path = f"jax_ep._src.ops.{module}.call.{module}_kernels"
        choose = getattr(few_tokens, f"{module}_kernels")
        monkeypatch.setattr(path, lambda *a, choose=choose: seen.append(choose(*a)) or seen[-1])
    monkeypatch.setattr(few_tokens, "_has_kernels", lambda _: True)
    for check in ("_why_no_table", "_why_no_room"):
        monkeypatch.setattr(few_tokens, check, lambda *_, **__: None)
    jax.tree.map(assert_same_bits, gradients(), expected)
    group.check()
    # Two forward, and their gradients: a combine and, along the handle, a pull of rows.
    assert [kernels.mode for kernels in seen] == [ExchangeMode.LOW_LATENCY] * 3
    assert {kernels.num_sms for kernels in seen} == {config.PLAIN_FEW_SMS}


def test_a_plain_combine_of_many_possible_rows_takes_the_other_kernels(monkeypatch):
    monkeypatch.setattr(native_modules, "load", lambda _: _Table(1000))
    rows = jax.ShapeDtypeStruct((config.MAX_FEW_ROWS + 1, 64), jnp.bfloat16)
    index = RowIndex(None, jnp.zeros((4, NUM_RANKS), jnp.int32), None, None)
    for mode, is_few in ((None, False), (ExchangeMode.LOW_LATENCY, True)):
        spec = _spec(RouteSpec, mode=mode, recv_capacity=rows.shape[0])
        found = few_tokens.combine_kernels(spec, index, rows)
        assert (found.mode is ExchangeMode.LOW_LATENCY) == is_few


def test_plain_calls_with_sms_take_the_kernels_that_need_few(monkeypatch):
    """A number of SMs, of the call or of the group, is a wish to leave the others alone."""
    seen = _specs_of_dispatches(monkeypatch)
    x, ids, _ = inputs()
    plain = partial(jax_ep.dispatch, num_experts=NUM_EXPERTS, recv_capacity=100)
    for of_group, of_call in ((None, None), (7, None), (None, 3)):
        with jax_ep.Group.open(make_mesh(NUM_RANKS), "ep", name="free", num_sms=of_group) as opened:
            dispatch = partial(plain, group=opened, num_sms=of_call)
            jax.eval_shape(on_ranks(lambda x, i, d=dispatch: d(x, i).x, opened.mesh), x, ids)
    modes = [spec.mode for spec in seen[:: len(seen) // 3]]
    assert modes == [None, ExchangeMode.THROUGHPUT, ExchangeMode.THROUGHPUT]


def test_large_tables_take_the_other_kernels(monkeypatch):
    monkeypatch.setattr(native_modules, "load", lambda _: _Table(limits.MAX_LOW_LATENCY_TABLE + 1))
    rows = [jax.ShapeDtypeStruct((4, 64), jnp.bfloat16)]
    found = few_tokens.dispatch_kernels(_spec(), (4, 2), rows)
    assert found.mode is ExchangeMode.THROUGHPUT


def test_a_combine_on_few_sms_must_fit_its_table():
    rows = jax.ShapeDtypeStruct((9, 64), jnp.bfloat16)
    wide = _group_spec(low_latency_room=1 << 40)
    facts = {"kind": RouteSpec, "group": wide, "layout": Layout.EXPERT}

    def index(num_tokens):
        slots = jnp.zeros((num_tokens, 2), jnp.int32)
        return RowIndex(slots, slots, jnp.zeros((9,), jnp.int32), jnp.zeros((9,), jnp.int32))

    for sms in (None, 64, 1):
        few_tokens.require_combine(_spec(few_sms=sms, **facts), index(6000), rows)
    message = "table of rows has 112000 bytes on each of 1 SMs, at most 98304"
    with pytest.raises(jax_ep.ConfigError, match=message):
        few_tokens.require_combine(_spec(few_sms=1, **facts), index(7000), rows)
    few_tokens.require_combine(_spec(few_sms=64, **facts), index(7000), rows)


def test_too_little_room_is_told_with_both_numbers():
    rows = [jax.ShapeDtypeStruct((100, 7168), jnp.bfloat16)]
    needed = limits.low_latency_payload(100, 2, [7168 * 2])
    wanted = jax_ep.low_latency_bytes(
        max_tokens_per_rank=100, hidden=7168, num_topk=2, num_ranks=NUM_RANKS
    )
    with pytest.raises(jax_ep.ConfigError, match=r"^low_latency_dispatch: a rank sends") as caught:
        few_tokens.require_dispatch(_spec(op="low_latency_dispatch"), (100, 2), rows)
    message = str(caught.value)
    assert f"sends {needed} bytes to another, and the group has room for 1048576" in message
    assert f"low_latency_bytes={wanted}" in message
    # The kernels of dispatch carry what may be dropped, and need no such room.
    few_tokens.require_dispatch(_spec(recv_capacity=199), (100, 2), rows)


def test_halves_need_a_room_of_their_own(monkeypatch):
    monkeypatch.setattr(native_modules, "load", lambda _: _Table(1000))
    rows = [jax.ShapeDtypeStruct((100, 7168), jnp.bfloat16)]
    needed = limits.low_latency_payload(100, 2, [7168 * 2])
    sizes = {"max_tokens_per_rank": 100, "hidden": 7168, "num_topk": 2, "num_ranks": NUM_RANKS}
    none, enough = (
        _group_spec(low_latency_room=1 << 40, in_flight_room=room) for room in (0, needed)
    )
    spec = _spec(group=none, op="low_latency_dispatch_send", recv_capacity=1000)
    with pytest.raises(jax_ep.ConfigError, match=r"^low_latency_dispatch_send: a rank") as caught:
        few_tokens.require_dispatch_halves(spec, (100, 2), rows)
    message = str(caught.value)
    assert f"sends {needed} bytes to another, and the group has room for 0" in message
    assert f"in_flight_bytes={jax_ep.in_flight_bytes(**sizes)}" in message
    few_tokens.require_dispatch_halves(_spec(group=enough, recv_capacity=1000), (100, 2), rows)
    # No other kernels can send and receive apart what may be dropped.
    with pytest.raises(jax_ep.ConfigError, match=r"recv_capacity must be at least .* got 10"):
        few_tokens.require_dispatch_halves(_spec(group=enough, recv_capacity=10), (100, 2), rows)


def test_sms_of_the_group_hold_for_low_latency_calls(monkeypatch):
    seen = _specs_of_dispatches(monkeypatch)
    x, ids, _ = inputs()
    with jax_ep.Group.open(make_mesh(NUM_RANKS), "ep", name="budget", num_sms=7) as budgeted:
        for options in ({}, {"num_sms": 3}):
            fn = on_ranks(lambda x, i, o=options: send(budgeted, x, i, **o).x, budgeted.mesh)
            jax.eval_shape(fn, x, ids)
    numbers = [spec.few_sms for spec in seen]
    assert set(numbers[: len(seen) // 2]) == {7}
    assert set(numbers[len(seen) // 2 :]) == {3}
