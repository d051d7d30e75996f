"""The algorithms that "auto" takes, and their tables."""

import json
import math
from argparse import Namespace
from itertools import pairwise
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

import jax_ep
from jax_ep._src.base import limits, tables
from jax_ep._src.base.options import Algorithm
from jax_ep._src.base.spec import ReduceSpec
from jax_ep._src.ops.all_reduce import choice
from jax_ep._src.ops.all_reduce_residual_rmsnorm.api import slot_padding
from jax_ep._src.ops.common.checks import Checks
from jax_ep.bench import reduce, tune
from jax_ep.bench.record import find_place
from jax_ep.bench.session import Session
from jax_ep.testing.ranks import make_mesh


def _text(steps, device="any", num_ranks=1):
    ops = dict.fromkeys(tables.OPS, steps)
    return json.dumps({"tables": [{"device": device, "num_ranks": num_ranks, "ops": ops}]})


def test_a_table_of_fewer_ranks_gives_way_to_one_of_more():
    """A table of two H100 does not serve eight of them."""
    two, eight = (tables.load("NVIDIA H100 80GB HBM3", n) for n in (2, 8))
    assert eight == tables.load("no such device", 8)
    assert two != tables.load("no such device", 2)


def test_the_table_chooses_by_bytes(monkeypatch, tmp_path):
    table = tables.load("no such device", 2)
    ours = [Algorithm.LOW_LATENCY, Algorithm.ONE_SHOT, Algorithm.TWO_SHOT]
    for op in tables.OPS:
        assert tables.pick(table, op, 1, [*ours, Algorithm.PSUM]) is Algorithm.LOW_LATENCY
        assert tables.pick(table, op, 1 << 40, [*ours, Algorithm.PSUM]) is Algorithm.PSUM
        assert tables.pick(table, op, 1 << 40, ours) is None
    path = tmp_path / "table.json"
    path.write_text(_text([[None, "two_shot"]]))
    monkeypatch.setenv("JAX_EP_TUNING", str(path))
    with jax_ep.Group.open(make_mesh(2), "ep", name="tuned") as group:
        assert tables.pick(group.tuning, "all_reduce", 5, ours) is Algorithm.TWO_SHOT


def test_groups_without_an_entry_in_the_file_take_the_packages(monkeypatch, tmp_path):
    """An entry for eight devices of a kind serves only eight devices of that kind."""
    cases = [("a", 8), ("a", 4), ("a", 16), ("b", 8), ("NVIDIA H100 80GB HBM3", 2)]
    package = {case: tables.load(*case) for case in cases}
    path = tmp_path / "table.json"
    path.write_text(_text([[None, "one_shot"]], device="a", num_ranks=8))
    monkeypatch.setenv("JAX_EP_TUNING", str(path))
    changed = [case for case in cases if tables.load(*case) != package[case]]
    assert changed == [("a", 8)]
    path.write_text('{"tables": []}')
    assert all(tables.load(*case) == package[case] for case in cases)


def _auto(op, x, has_packets=True):
    """Returns the algorithm of "auto" on two H100, whatever devices there are here."""
    group = SimpleNamespace(
        num_ranks=2,
        spec=SimpleNamespace(staging_bytes=None, has_packets=has_packets),
        tuning=tables.load("NVIDIA H100 80GB HBM3", 2),
    )
    group.spec.can_stage = lambda x: True
    padding = slot_padding(x) if op == "all_reduce_residual_rmsnorm" else 0
    options = {"allow_psum": True, "dtypes": (jnp.bfloat16,), "padding": padding, "kernel": op}
    stock = ReduceSpec(group.spec, "cuda", Algorithm.PSUM, "all_reduce")
    num_bytes = x.size * x.dtype.itemsize
    return choice.choose(Checks(op), group, stock, x, num_bytes, **options)


@pytest.mark.parametrize("op", tables.OPS)
def test_auto_changes_at_the_thresholds_of_the_table(op):
    """Thresholds count the bytes of an operand, as measured, without the padding of slots."""
    unit = (8192,) if op == "all_reduce_residual_rmsnorm" else ()
    steps = tables.load("NVIDIA H100 80GB HBM3", 2)[op]
    assert len(steps) > 1
    for step, next_step in pairwise(steps):
        assert step.bytes is not None
        at = step.bytes // (2 * math.prod(unit))
        found = [_auto(op, jax.ShapeDtypeStruct((at + n, *unit), jnp.bfloat16)) for n in (-1, 0, 1)]
        assert found == [step.algorithm, step.algorithm, next_step.algorithm]


def test_auto_takes_an_algorithm_that_has_room():
    """Each row of one element fills a whole slot."""
    op = "all_reduce_residual_rmsnorm"
    most = limits.slot_payload(2) // limits.SLOT_BYTES
    for rows, algorithm in ((most, Algorithm.LOW_LATENCY), (most + 1, Algorithm.ONE_SHOT)):
        assert _auto(op, jax.ShapeDtypeStruct((rows, 1), jnp.bfloat16)) is algorithm


def test_auto_sends_no_packets_that_may_arrive_in_parts():
    x = jax.ShapeDtypeStruct((8, 8), jnp.bfloat16)
    for op in ("all_reduce", "all_reduce_residual_rmsnorm"):
        assert _auto(op, x) is Algorithm.LOW_LATENCY
        assert _auto(op, x, has_packets=False) is Algorithm.ONE_SHOT


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{", "is no table of algorithms: JSONDecodeError"),
        ('{"tables": [{"device": "any", "num_ranks": 1, "ops": {}}]}', "KeyError: 'all_reduce'"),
        (_text([[8, "one_shot"], [4, "psum"], [None, "psum"]]), "sizes of all_reduce must ascend"),
        (_text([[None, "one_shot"], [None, "psum"]]), "sizes of all_reduce must ascend"),
        (_text([[8, "one_shot"]]), "the last entry of all_reduce must be for any size"),
    ],
)
def test_a_bad_table_is_an_error(monkeypatch, tmp_path, text, match):
    path = tmp_path / "table.json"
    path.write_text(text)
    monkeypatch.setenv("JAX_EP_TUNING", str(path))
    with pytest.raises(jax_ep.ConfigError, match=match):
        jax_ep.Group.open(make_mesh(2), "ep", name="badly_tuned")
    monkeypatch.setenv("JAX_EP_TUNING", str(tmp_path / "missing.json"))
    with pytest.raises(jax_ep.ConfigError, match="JAX_EP_TUNING: cannot read"):
        jax_ep.Group.open(make_mesh(2), "ep", name="badly_tuned")


def test_tune_measures_on_gpus_only(tmp_path):
    args = Namespace(out=tmp_path / "t.json", most_mib=1, commit=None, ranks=2)
    with pytest.raises(jax_ep.GroupError, match="nothing to choose on back end 'cpu'"):
        tune.main(args)


def test_tune_keeps_the_fastest_algorithm(tmp_path):
    """The file that it writes can be loaded, and keeps entries of other devices."""
    found = {
        1: {"low_latency": 1.0, "one_shot": 2.0, "psum": 3.0},
        4: {"low_latency": 2.0, "one_shot": 3.0, "psum": 3.0},
        16: {"one_shot": 4.0, "psum": 5.0},
        64: {"one_shot": 9.0, "psum": 8.0},
    }
    steps = tune._steps(found)
    assert steps == [[4, "low_latency"], [16, "one_shot"], [None, "psum"]]
    path = tmp_path / "t.json"
    for device, num_ranks in (("a", 2), ("b", 2), ("a", 2), ("a", 4)):
        entry = {"device": device, "num_ranks": num_ranks}
        tune._write(path, {**entry, "ops": dict.fromkeys(tables.OPS, steps)})
    assert len(json.loads(path.read_text())["tables"]) == 3


def test_tune_measures_like_bench(groups, tmp_path, monkeypatch):
    """Tune takes medians of bench's records, by algorithm and by every size that holds a row."""
    group = groups(2)
    monkeypatch.setattr(reduce, "_STEPS", 2)
    monkeypatch.setattr(reduce, "HIDDEN", 512)
    names = ["low_latency", "two_shot", "psum"]
    place = find_place("c")
    session = Session(group, place, repeats=1, copy_rate=1e9, backends=["cpu"], algorithms=names)
    rows = tune.measure(session, [512, 1024], repeats=1)
    medians = tune.collect([row.record for row in rows])
    assert list(medians) == list(tables.OPS)
    for op, sizes in medians.items():
        expected = names if op == "all_reduce" else [n for n in names if n != "two_shot"]
        assert list(sizes) == ([1024] if op == "all_reduce_residual_rmsnorm" else [512, 1024])
        assert all(list(us) == expected for us in sizes.values())
        assert tune._steps(sizes)[-1][0] is None
    first = rows[0].record
    assert medians["all_reduce"][512]["low_latency"] == round(first.us["p50"], 2)
