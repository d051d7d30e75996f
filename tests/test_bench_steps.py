"""Single steps that the devices' clocks time: their chains, a late rank, tables and pages."""

import importlib
import re
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jax_ep.bench import reduce, report, steps, timing
from jax_ep.bench.contenders import contenders
from jax_ep.bench.record import Record
from jax_ep.bench.shapes import Shape, make_inputs, make_point, make_reduce_point
from jax_ep.testing.clock import read_clock
from jax_ep.testing.ranks import on_ranks

PAGES = Path(__file__).parent.parent / "benchmarks" / "pages"
NUM = 3


def _link(group, op, layout, *, is_stock=False):
    shape = Shape(tokens=8, hidden=16, topk=2, experts=4)
    point = make_point(
        "test", shape, dtype="f32", layout=layout, num_ranks=2, balance=None, fill="zeros"
    )
    contender = contenders(point, group, [("cpu", None)])[is_stock]
    program = timing.make_program(op, contender)
    return steps.Link(
        program.run, timing.start(program, group.mesh, make_inputs(point, group.mesh))
    )


def _sum_link(group, op, contender):
    point = make_reduce_point(op, 4096, dtype="f32", hidden=256)
    entrants = reduce.contenders(point, group, ["cpu"])
    return reduce.links(point, group, entrants)[[e.name for e in entrants].index(contender)]


def _compiled(group, link):
    """The instructions of a chain of NUM operations."""
    chain = on_ranks(steps.make_chain(link.run, NUM), group.mesh, check_vma=False)
    text = chain.lower(link.carry, np.zeros((2, 1), np.int32)).compile().as_text()
    return text[text.index("\nENTRY ") :].partition("\n}")[0]


@pytest.mark.parametrize(
    ("op", "layout", "calls"),
    [
        ("dispatch", "rank", ["dispatch"]),
        ("combine", "expert", ["combine"]),
        ("round_trip", "expert", ["combine", "dispatch"]),
        ("all_reduce", None, ["all_reduce"]),
    ],
)
def test_a_step_is_the_operation_and_a_reading(groups, op, layout, calls):
    """Every call is made, in its place, and no array that goes through a reading is copied."""
    group = groups(2)
    link = _sum_link(group, op, "jax_ep") if layout is None else _link(group, op, layout)
    text = _compiled(group, link)
    found = re.findall(r'custom_call_target="jax_ep\.(\w+)"', text)
    assert found == ["read_clock", *NUM * [*calls, "read_clock"]]
    assert " copy(" not in text


def test_every_collective_of_stock_jax_is_between_two_readings(groups):
    group = groups(2)
    for link, name, count in (
        (_link(group, "combine", "rank", is_stock=True), "reduce-scatter", 1),
        (_link(group, "dispatch", "rank", is_stock=True), "all-gather", 3),
        (_sum_link(group, "all_reduce", "psum"), "all-reduce", 1),
    ):
        text = _compiled(group, link)
        parts = text.split('custom_call_target="jax_ep.read_clock"')
        inner = [len(re.findall(rf" {name}\(", part)) for part in parts[1:-1]]
        assert inner == NUM * [count], name
        assert text.count(f" {name}(") == NUM * count


def test_a_late_rank_makes_its_peers_wait(groups, monkeypatch):
    """Each step of the peers holds the delay; one rank alone has no peer."""
    monkeypatch.setattr(steps, "_LINKS", 12)
    delay_us = 5000
    for num_ranks in (1, 2):
        group = groups(num_ranks)
        link = _sum_link(group, "all_reduce", "jax_ep")
        (found,) = steps.measure([link], group, num_steps=10, delay_us=delay_us)
        assert found.count >= 10
        assert found.tick_ns > 0
        assert set(found.us) == {"p50", "p90", "p99"}
        if num_ranks == 1:
            assert (found.delay_us, found.delayed_us) == (None, None)
        else:
            assert found.delay_us == delay_us
            assert found.delayed_us is not None
            assert found.delayed_us["p50"] > delay_us / 2


def test_a_coarse_clock_is_read_over_several_steps(groups, monkeypatch):
    """Times of a made-up clock: of steps in a row the mean is taken, rank by rank."""
    monkeypatch.setattr(steps, "_LINKS", 24)
    monkeypatch.setattr(steps, "_measure_tick", lambda group: 1024)
    group = groups(2)

    def made_up(time):
        steps_of_ranks = np.array([[2048, 3072], [4096, 5120]])  # short and long ones in turn
        number = np.arange(time.shape[1])
        return (number // 2 * steps_of_ranks.sum(axis=1)[:, None]) + np.where(
            number % 2 == 1, steps_of_ranks[:, :1], 0
        )

    monkeypatch.setattr(steps, "nanoseconds", made_up)
    (found,) = steps.measure([_sum_link(group, "all_reduce", "psum")], group, num_steps=20)
    assert (found.span, found.tick_ns) == (11, 1024)
    # The chain of readings has the same times here; the slowest rank takes 4.608 us more or less.
    assert found.clock_us == pytest.approx((2.56 + 4.608) / 2, abs=0.1)
    assert found.us["p50"] == pytest.approx(4.608 - found.clock_us, abs=0.1)
    assert found.us["p99"] == pytest.approx(4.608 - found.clock_us, abs=0.1)


def test_a_slow_operation_gets_few_steps(groups, monkeypatch):
    """A first run decides; the others keep their chain."""
    monkeypatch.setattr(steps, "_LINKS", 24)
    group = groups(2)
    link = _sum_link(group, "all_reduce", "psum")

    def wait(given, made):
        time, _, passed = read_clock(jnp.full((1,), 20_000, jnp.int32), link.run(given, made))
        return passed + jnp.minimum(time[0], 0).astype(passed.dtype)

    slow, fast = steps.measure(
        [steps.Link(wait, link.carry), link], group, num_steps=30, slow_us=5000
    )
    assert slow.us["p50"] > 15_000
    assert slow.count == steps._FEW * steps._FEW_RUNS
    assert fast.us["p50"] < slow.us["p50"]
    assert fast.count >= 30
    (unasked,) = steps.measure([steps.Link(wait, link.carry)], group, num_steps=2)
    assert unasked.count == 24 - steps._FIRST - unasked.span + 1


STEPS = steps.Steps(
    count=1020,
    us={"p50": 12.0, "p90": 13.0, "p99": 21.0},
    clock_us=1.5,
    tick_ns=32,
    span=1,
    delay_us=50,
    delayed_us={"p50": 63.0, "p90": 64.0, "p99": 75.0},
)


def _record(**facts):
    known = dict.fromkeys(Record.__dataclass_fields__)
    known |= {"op": "round_trip", "contender": "jax_ep", "backend": "cuda", "shape": "decode"}
    known |= {"algorithm": "low_latency", "layout": "rank", "dtype": "bf16", "tokens": 128}
    known |= {"hidden": 7168, "topk": 8, "experts": 256, "num_ranks": 2, "num_processes": 1}
    known |= {"us": {"p50": 30.0, "p10": 29.0, "p90": 31.0, "p99": 33.0}, "floor_us": 10.0}
    known |= {"wire_bytes": 1000, "steps": STEPS, "run": "r", "time": "t", "commit": "abcdef12"}
    known |= {"device": "NVIDIA H200", "versions": {"jax": "0.11.2", "driver": "1"}}
    return Record(**known | facts)


def test_the_command_shows_steps_and_a_late_rank():
    timed = timing.Timing((40.0,), (10.0,), 48)
    rows = [report.Row(_record(), timed), report.Row(_record(op="dispatch", steps=None), timed)]
    head, first, second = report.format_table(rows).splitlines()
    assert re.search(r"us p50 .* step p50  step p90  step p99  floor us", head)
    assert re.search(r" 12\.0 +13\.0 +21\.0 ", first)
    assert " 12.0 " not in second
    assert "takes 1.50 us" in report.format_clock(rows)
    assert "tick is 32 ns" in report.format_clock(rows)
    head, line = report.format_late_table(rows).splitlines()
    assert re.search(r"step p50  late by us  others p50 +p90 +p99  p50 - delay$", head)
    assert line.split()[-6:] == ["12.0", "50", "63.0", "64.0", "75.0", "13.0"]
    assert report.format_late_table(rows[1:]) == report.format_clock(rows[1:]) == ""
    assert "step p50" not in report.format_table(rows[1:])


@pytest.fixture
def import_pages(monkeypatch):
    """Imports modules of the program that writes the pages, by name."""
    monkeypatch.syspath_prepend(PAGES)
    before = set(sys.modules)
    yield lambda *names: [importlib.import_module(name) for name in names]
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(PAGES)):
            del sys.modules[name]


def _stored(**facts):
    """A record as files have it."""
    return {**vars(_record()), "steps": vars(STEPS), "file": "f.jsonl", **facts}


def _without_steps(record):
    """As records of before."""
    return {name: value for name, value in record.items() if name != "steps"}


def _rows(text):
    return [line for line in text.splitlines() if line.startswith(("| `", "| rank", "| expert"))]


def test_pages_have_steps_of_the_records_that_know_them(import_pages, monkeypatch):
    """Records of before have no such field; the table of a late rank leaves out who was in time."""
    pages, records = import_pages("single_steps", "records")
    in_time = {**vars(STEPS), "delay_us": None, "delayed_us": None}
    size = {"op": "all_reduce", "layout": None, "topk": None}
    small, large = (_stored(shape=shape, **size) for shape in ("1 KiB", "64 KiB"))
    stock = {**small, "contender": "psum", "algorithm": None}
    large["steps"] = in_time
    old = _without_steps(small)
    known = [{**old, "op": "all_gather"}, old, small, stock, large, _stored()]
    monkeypatch.setattr(records, "load", lambda: known)
    table = pages.single_steps("docs/performance.md")
    assert _rows(table) == [
        "| `all_reduce`, bf16, 1 KiB | 2 | 30.0 | 12.0 | 13.0 | 21.0 | 12.0 | 21.0 |",
        "| `all_reduce`, bf16, 64 KiB | 2 | 30.0 | 12.0 | 13.0 | 21.0 |  |  |",
    ]
    assert "f.jsonl" in table
    late = pages.a_late_rank("docs/performance.md")
    assert _rows(late) == ["| `all_reduce`, bf16, 1 KiB | 2 | 12.0 | 63.0 | 75.0 | 13.0 |"]
    monkeypatch.setattr(records, "load", lambda: [old])
    for make in (pages.single_steps, pages.a_late_rank):
        assert make("docs/performance.md") == "*No record has these times yet.*\n"


def test_tables_of_few_tokens_have_the_newest_steps(import_pages, monkeypatch):
    """Chains where there are no steps; a late rank's peers without its delay."""
    pages, records = import_pages("few", "records")
    slower = {**vars(STEPS), "us": {"p50": 22.0, "p90": 23.0, "p99": 24.0}}
    many = _stored(algorithm=None, steps=slower, sms=16)
    old = _without_steps(_stored(op="combine", layout="expert", commit="0123456"))
    newest = _stored(op="dispatch")
    before = {**newest, "steps": slower, "commit": "0123456"}
    known = [old, before, _without_steps(before), newest, _stored(tokens=8), _stored(), many]
    monkeypatch.setattr(records, "load", lambda: known)
    table = pages.few_tokens("docs/performance.md")
    sizes = "bf16, 7,168, top-8 of 256"
    assert _rows(table) == [
        f"| rank, {sizes} | 8 |  |  |  |  | 12.0 | 21.0 |",
        f"| rank, {sizes} | 128 | 12.0 | 21.0 |  |  | 12.0 / 22.0 | 21.0 / 24.0 |",
        f"| expert, {sizes} | 128 |  |  | 30.0 | 33.0 |  |  |",
    ]
    late = pages.late_rank("docs/performance.md")
    assert _rows(late) == [
        f"| rank, {sizes} | 8 |  |  | 13.0 |",
        f"| rank, {sizes} | 128 | 13.0 |  | 13.0 / 13.0 |",
    ]
    assert "0123456" in table
    assert "0123456" not in late


def test_the_table_of_ragged_exchanges_says_how_few_steps_were_counted(import_pages, monkeypatch):
    """XLA's other kernel has a column of its own; ours of that run is not in the table."""
    pages, records = import_pages("ragged_exchanges", "records")

    def line(contender, kind, p50, count, **facts):
        of = {"op": "ragged_all_to_all", "kind": kind, "kib": 57344, "pieces": 1, "xla_flags": ""}
        of |= {"timing": "steps", "us": {"p50": p50, "p90": p50, "p99": p50 + 1}}
        return _stored(contender=contender, steps={"count": count}, **of | facts)

    other = {"xla_flags": "--xla_gpu_experimental_ragged_all_to_all_use_device_kernel=true"}
    known = [
        line("jax_ep", "skewed", 140.0, 1020),
        line("jax_ep", "balanced", 120.0, 1020),
        line("ragged_all_to_all", "balanced", 87000.0, 16),
        line("all_to_all", "balanced", 130.0, 1020),
        line("jax_ep", "balanced", 999.0, 1020, **other),
        line("ragged_all_to_all", "balanced", 200.0, 1020, **other),
        line("jax_ep", "balanced", 1.0, 1020, timing="chain"),
    ]
    monkeypatch.setattr(records, "load", lambda: known)
    lines = pages.ragged("docs/performance.md").splitlines()
    assert lines[2:4] == [
        "| balanced, 1 a peer | 57,344 | 120 | 121 | 87,000 (16 steps) | 200 | 130 | 10.0 |",
        "| skewed, 1 a peer | 57,344 | 140 | 141 |  |  |  | 10.0 |",
    ]
    monkeypatch.setattr(records, "load", lambda: [known[-1]])
    assert pages.ragged("docs/performance.md") == "*No record has these times yet.*\n"
