"""SMs by exchange and layout: the source of each number, and the number that a call gets."""

import argparse
import json
import re
from importlib import resources
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from budget_tables import KEYS, OLD, plain

import jax_ep
from jax_ep._src.base import tables
from jax_ep._src.base.options import Layout
from jax_ep.bench import session
from jax_ep.bench.contenders import ours
from jax_ep.bench.shapes import Shape, make_point
from jax_ep.testing import doctor
from jax_ep.testing.compare import assert_same_bits
from jax_ep.testing.ranks import make_mesh, on_ranks


def _numbers(budgets):
    return [
        budgets.of[exchange][Layout(layout)].backend or budgets.of[exchange][Layout(layout)].sms
        for exchange, layout in KEYS
    ]


# --- the choice


@pytest.fixture(scope="module")
def shipped():
    text = resources.files("jax_ep._src.base").joinpath("tables.json").read_text()
    tables = {(t["device"], t["num_ranks"]): t for t in json.loads(text)["tables"]}
    return {key: table["budgets"] for key, table in tables.items() if "budgets" in table}


@pytest.mark.parametrize(
    ("group", "entry", "where"),
    [
        (("NVIDIA H200", 2), ("NVIDIA H200", 2), "NVIDIA H200, 2 ranks"),
        (("NVIDIA H100 80GB HBM3", 2), ("NVIDIA H100 80GB HBM3", 2), "HBM3, 2 ranks"),
        (("NVIDIA H200", 4), ("any", 1), "any device, from 1 rank"),
        (("no such device", 8), ("any", 1), "any device, from 1 rank"),
    ],
)
def test_the_package_serves_every_group(shipped, group, entry, where):
    found, plain = tables.load_budgets(*group), shipped[entry]
    values = [plain[exchange][layout] for exchange, layout in KEYS]
    assert _numbers(found) == [v.get("backend", v["sms"]) for v in values]
    assert found.source.startswith("the package's table, ")
    assert f"{where}: {plain['source']}" in found.source


def test_the_expert_layout_is_not_starved(shipped):
    """20 SMs serve the rank layout well, but take twice the time in the expert layout."""
    assert ("NVIDIA H200", 2) in shipped
    for budgets, exchange in product(shipped.values(), tables.EXCHANGES):
        found = budgets[exchange]["expert"]
        assert found["sms"] >= 32 or found.get("backend") == "xla"


def test_a_file_serves_the_entries_that_it_has(write_tables):
    """A group takes its own entry, else one for any device; entries without budgets are skipped."""
    package = tables.load_budgets("a", 2)
    path = write_tables(
        ("a", 2, plain(1)),
        ("a", 4, OLD),
        ("any", 2, plain(11)),
        ("any", 4, plain(21)),
        ("any", 4, OLD),
        ("b", 2, plain(41)),  # an older entry
        ("b", 2, OLD | plain(31)),
    )
    expected = {("a", 2): 1, ("a", 3): 11, ("a", 4): 21, ("a", 8): 21, ("b", 2): 31, ("b", 5): 21}
    for group, first in expected.items():
        found = tables.load_budgets(*group)
        assert _numbers(found) == list(range(first, first + 6)), group
        assert found.source.startswith(f"JAX_EP_TUNING={path}, ")
        assert found.source.endswith(f"made up from {first}")
    assert tables.load_budgets("a", 1) == package
    # The budgets of the file leave the package's algorithms alone.
    (step,) = tables.load("a", 4)["all_reduce"]
    assert (step.bytes, step.algorithm.name) == (None, "ONE_SHOT")
    write_tables(("a", 2, plain(1)))
    assert len(tables.load("a", 2)["all_reduce"]) > 1


def test_named_sms_and_back_ends_are_not_overruled(write_tables):
    write_tables(("a", 2, plain(1, xla=[("combine", "expert")])))
    assert _numbers(tables.load_budgets("a", 2)) == [1, 2, 3, 4, 5, "xla"]
    assert _numbers(tables.load_budgets("a", 2, is_auto=False)) == [1, 2, 3, 4, 5, 6]
    for is_auto in (True, False):
        found = tables.load_budgets("a", 2, num_sms=9, is_auto=is_auto)
        assert (_numbers(found), found.source) == ([9] * 6, "num_sms of Group.open")


def test_several_nodes_take_the_budgets_of_the_ranks_of_one(write_tables):
    """A table that prefers `xla` has measured one level."""
    write_tables(("cpu", 4, plain(1)), ("cpu", 2, plain(11, xla=[("combine", "expert")])))
    with jax_ep.Group.open(make_mesh(4), "ep", name="nodes", ranks_per_node=2) as group:
        assert _numbers(group.budgets) == list(range(11, 17))
    with jax_ep.Group.open(make_mesh(4), "ep", name="one node") as group:
        assert _numbers(group.budgets) == list(range(1, 7))


def test_a_file_without_budgets_leaves_the_packages(write_tables):
    before = tables.load_budgets("cpu", 2)
    write_tables(("cpu", 2, OLD))
    with jax_ep.Group.open(make_mesh(2), "ep", name="old_file") as group:
        assert group.budgets == before
        assert len(group.tuning["all_reduce"]) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b.pop("source"), "KeyError: 'source'"),
        (lambda b: b.update(source=3), "source must be a string, got 3"),
        (lambda b: b.pop("combine"), "KeyError: 'combine'"),
        (lambda b: b["dispatch"].pop("expert"), "KeyError: 'expert'"),
        (lambda b: b["dispatch"]["rank"].update(sms=0), "sms must be a positive whole number"),
        (lambda b: b["dispatch"]["rank"].update(sms=True), "sms must be a positive whole number"),
        (lambda b: b["dispatch"]["rank"].update(sms="xla"), "sms must be a positive whole number"),
        (lambda b: b["combine"]["rank"].update(backend="cuda"), "must be 'xla' or left out"),
        (lambda b: b["combine"].update(rank=20), "TypeError"),
    ],
)
def test_bad_budgets_are_an_error(write_tables, change, message):
    parts = plain(1)
    change(parts["budgets"])
    write_tables(("any", 1, parts))
    with pytest.raises(jax_ep.ConfigError, match=f"is no table of algorithms: .*{message}"):
        jax_ep.Group.open(make_mesh(2), "ep", name="bad_budgets")


def test_an_empty_entry_is_an_error(write_tables):
    write_tables(("any", 1, {}))
    with pytest.raises(jax_ep.ConfigError, match="KeyError: 'ops'"):
        tables.load_budgets("cpu", 2)


# --- the number that a call gets

R, T, K = 2, 6, 2
X = np.random.default_rng(0).standard_normal((R, T, 128)).astype(np.float32)
IDS = np.random.default_rng(1).permuted(np.tile(np.arange(4, dtype=np.int32), (R, T, 1)), axis=2)
WEIGHTS = np.random.default_rng(2).random((R, T, K), np.float32)


def _dispatch(group, layout, x, weights, ids, **options):
    return jax_ep.dispatch(
        x,
        ids,
        weights,
        group=group,
        num_experts=4,
        layout=layout,
        recv_capacity=R * T * K,
        **options,
    )


def _of_dispatch(group, layout, options):
    def run(x, weights, ids):
        out = _dispatch(group, layout, x, weights, ids, **options)
        return out.x, out.weights

    return run


def _of_dispatch_fp8(group, layout, options):
    def run(x, weights, ids):
        out = jax_ep.dispatch_fp8(
            x,
            ids,
            weights,
            group=group,
            num_experts=4,
            layout=layout,
            recv_capacity=R * T * K,
            **options,
        )
        return out.x, out.weights

    return run


def _handle(group, layout, ids):
    """Makes a handle on back end `xla`, so without a custom call that has a budget."""
    return _dispatch(group, layout, jnp.ones((T, 4)), None, ids, backend="xla").handle


def _of_cached_dispatch(group, layout, options):
    def run(x, weights, ids):
        return jax_ep.dispatch(x, handle=_handle(group, layout, ids), **options).x, weights

    return run


def _of_combine(group, layout, options):
    def run(x, weights, ids):
        handle = _handle(group, layout, ids)
        rows = jnp.concatenate([x] * (R * K))
        at_tokens = weights if layout == "expert" else None
        return jax_ep.combine(rows, handle, weights=at_tokens, **options), weights

    return run


def _of_combine_weights(group, layout, options):
    options.pop("num_sms", None)

    def run(x, weights, ids):
        at_rows = jnp.concatenate([weights] * (R * K))
        w = at_rows if layout == "rank" else at_rows[:, 0]
        return jax_ep.combine_weights(w, _handle(group, layout, ids), **options), x

    return run


PROGRAMS = {
    "dispatch": _of_dispatch,
    "dispatch_fp8": _of_dispatch_fp8,
    "cached_dispatch": _of_cached_dispatch,
    "combine": _of_combine,
    "combine_weights": _of_combine_weights,
}
# Targets of the operation, and of its gradient, by program and layout.
TARGETS = {
    ("dispatch", "rank"): ("dispatch", "combine pull_rows"),
    ("dispatch", "expert"): ("dispatch", "combine pull_rows"),
    ("dispatch_fp8", "rank"): ("dispatch", "combine pull_rows"),
    ("dispatch_fp8", "expert"): ("dispatch", "combine pull_rows"),
    ("cached_dispatch", "rank"): ("pull_rows", "combine"),
    ("cached_dispatch", "expert"): ("pull_rows", "combine"),
    ("combine", "rank"): ("combine", "pull_rows"),
    ("combine", "expert"): ("combine pull_rows", "pull_rows"),  # weights move to the rows
    ("combine_weights", "rank"): ("combine", "pull_rows"),
    ("combine_weights", "expert"): ("pull_rows", "pull_rows"),
}


def _exchange_of(target):
    return "cached_dispatch" if target == "pull_rows" else target


def _with_gradient(run):
    def both(x, weights, ids):
        out, back = jax.vjp(lambda x, weights: run(x, weights, ids), x, weights)
        return out, back(out)

    return both


def _calls(fn, group):
    """Returns (target, num_sms) of every custom call that has a budget."""
    text = on_ranks(fn, group.mesh).lower(X, WEIGHTS, IDS[..., :K]).as_text()
    found = re.findall(r"custom_call @jax_ep\.(\w+)\(.*?mhlo\.backend_config = \{(.*?)\}", text)
    assert all("num_sms" in attributes for target, attributes in found if target != "check_mesh")
    return {
        (target, int(number))
        for target, attributes in found
        for number in re.findall(r"num_sms = (\d+)", attributes)
        if target != "check_mesh"
    }


@pytest.fixture
def budgeted(write_tables):
    """Opens a group with six different budgets, of which back end `xla` takes some."""
    groups = []

    def open_(xla=(), **options):
        write_tables(("cpu", R, plain(31, xla=xla)))
        groups.append(jax_ep.Group.open(make_mesh(R), "ep", name="budgeted", **options))
        return groups[-1]

    yield open_
    for group in groups:
        group.close()


SMS = {key: sms for sms, key in enumerate(KEYS, 31)}


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_call_has_the_budget_of_its_exchange(budgeted, program, layout):
    group = budgeted()
    run = PROGRAMS[program](group, layout, {})
    forward, back = (targets.split() for targets in TARGETS[program, layout])
    for fn, targets in ((run, forward), (_with_gradient(run), forward + back)):
        expected = {(t, SMS[_exchange_of(t), layout]) for t in targets}
        assert _calls(fn, group) == expected


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_named_number_of_sms_holds(budgeted, program, layout):
    """A group's number holds for all calls. A call's number overrules it, also in the gradient."""
    group = budgeted(num_sms=7)
    targets = " ".join(TARGETS[program, layout]).split()
    plain = _with_gradient(PROGRAMS[program](group, layout, {}))
    assert _calls(plain, group) == {(t, 7) for t in targets}
    if program != "combine_weights":
        told = _with_gradient(PROGRAMS[program](group, layout, {"num_sms": 9}))
        assert _calls(told, group) == {(t, 9) for t in targets}


@pytest.mark.parametrize("stock", [*tables.EXCHANGES, "the other layout"])
@pytest.mark.parametrize("program", PROGRAMS)
def test_xla_takes_the_exchanges_that_it_is_faster_at(budgeted, program, layout, stock):
    """`xla` takes this exchange in this layout, also in gradients, and no other."""
    others = [key for key in KEYS if key[1] != layout]
    group = budgeted(xla=others if stock == "the other layout" else [(stock, layout)])
    targets = " ".join(TARGETS[program, layout]).split()
    kept = [t for t in targets if _exchange_of(t) != stock]
    run = _with_gradient(PROGRAMS[program](group, layout, {}))
    assert _calls(run, group) == {(t, SMS[_exchange_of(t), layout]) for t in kept}


@pytest.mark.parametrize("program", PROGRAMS)
def test_xla_does_not_overrule_a_named_back_end(budgeted, program, layout):
    targets = " ".join(TARGETS[program, layout]).split()
    expected = {(t, SMS[_exchange_of(t), layout]) for t in targets}
    named = budgeted(xla=KEYS, backend="cpu")
    assert _calls(_with_gradient(PROGRAMS[program](named, layout, {})), named) == expected
    named.close()
    group = budgeted(xla=KEYS)
    assert _calls(_with_gradient(PROGRAMS[program](group, layout, {})), group) == set()
    told = _with_gradient(PROGRAMS[program](group, layout, {"backend": "cpu"}))
    assert _calls(told, group) == expected
    if program != "combine_weights":
        told = _with_gradient(PROGRAMS[program](group, layout, {"num_sms": 9}))
        assert _calls(told, group) == {(t, 9) for t in targets}


def _round_trip(group, layout):
    def step(x, weights, ids):
        out = _dispatch(group, layout, x, weights, ids)
        weights = out.weights if layout == "expert" else None
        again = jax_ep.dispatch(x * 2, handle=out.handle).x
        return jax_ep.combine(out.x + again, out.handle, weights=weights), out.handle

    def both(x, weights, ids):
        y, back, handle = jax.vjp(lambda x, w: step(x, w, ids), x, weights, has_aux=True)
        # XLA chooses the order of the sum in the gradient of the weights.
        return y, back(y)[0], jax.tree.leaves(handle)

    return jax.tree.leaves(on_ranks(both, group.mesh)(X, WEIGHTS, IDS[..., :K]))


def test_other_back_ends_give_the_bits_of_the_group(groups, budgeted, layout):
    """Handles of one back end serve operations and gradients of the other one, both ways."""
    expected = _round_trip(groups(R), layout)
    for stock in [*([(exchange, layout)] for exchange in tables.EXCHANGES), KEYS]:
        group = budgeted(xla=stock)
        for got, wanted in zip(_round_trip(group, layout), expected, strict=True):
            assert_same_bits(got, wanted)
        group.close()


def test_info_tells_the_budgets(write_tables, capsys):
    path = write_tables(("cpu", R, plain(31, xla=[("combine", "expert")])))
    by_table: dict[str, dict[str, Any]] = {
        "dispatch": {"rank": 31, "expert": 32},
        "cached_dispatch": {"rank": 33, "expert": 34},
        "combine": {"rank": 35, "expert": "xla"},
    }
    source = f"JAX_EP_TUNING={path}, cpu, {R} ranks: made up from 31"
    with jax_ep.Group.open(make_mesh(R), "ep", name="told") as group:
        info = group.info()
        assert (info.num_sms, info.budgets, info.budgets_from) == (None, by_table, source)
    with jax_ep.Group.open(make_mesh(R), "ep", name="told", backend="cpu") as group:
        info = group.info()
        by_table["combine"]["expert"] = 36
        assert (info.num_sms, info.budgets, info.budgets_from) == (None, by_table, source)
    with jax_ep.Group.open(make_mesh(R), "ep", name="told", num_sms=9) as group:
        info = group.info()
        everywhere = {name: {"rank": 9, "expert": 9} for name in by_table}
        assert (info.num_sms, info.budgets) == (9, everywhere)
        assert info.budgets_from == "num_sms of Group.open"
    write_tables(("cpu", len(jax.devices()), plain(31, xla=[("combine", "expert")])))
    doctor.main(argparse.Namespace(json=False))
    printed = capsys.readouterr().out
    assert "  combine: rank layout 35, expert layout xla\n" in printed
    assert f"  from JAX_EP_TUNING={path}, cpu, 8 ranks: made up from 31\n" in printed


def test_bench_runs_at_the_budgets_and_records_them(budgeted):
    group = budgeted()
    for layout in ("rank", "expert"):
        sizes = Shape(tokens=8, hidden=16, topk=2, experts=4)
        options = {"dtype": "f32", "num_ranks": R, "balance": None, "fill": "zeros"}
        point = make_point("small", sizes, layout=layout, **options)
        default, told = (ours(point, group, "cuda", sms) for sms in (None, 5))
        for exchange in tables.EXCHANGES:
            assert session._subject(exchange, point, told, group).sms == 5
            assert session._subject(exchange, point, default, group).sms == SMS[exchange, layout]
        assert session._subject("round_trip", point, default, group).sms == SMS["combine", layout]
        stock = ours(point, group, "xla", None)
        assert session._subject("combine", point, stock, group).sms is None
        contender = ours(point, group, "cpu", None)

        def trip(x, weights, ids, contender=contender):
            out = contender.dispatch(x, ids, weights)
            return contender.combine(out), contender.again(x, out.handle).x

        expected = {"dispatch": "dispatch", "pull_rows": "cached_dispatch", "combine": "combine"}
        assert _calls(trip, group) == {(t, SMS[e, layout]) for t, e in expected.items()}
