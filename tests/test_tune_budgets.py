"""`tune`: picks SMs by exchange and layout from measured times, and writes them."""

import json
from argparse import Namespace

import pytest
from budget_tables import OLD, plain

import jax_ep
from jax_ep._src.base import tables
from jax_ep.bench import session, tune
from jax_ep.testing.ranks import make_mesh

R = 2


@pytest.mark.parametrize(
    ("us", "expected"),
    [
        # The smallest number within 3 % of the fastest wins.
        ({16: 104.0, 20: 103.0, 48: 100.0, 64: 101.0, "xla": 200.0}, {"sms": 20}),
        ({16: 103.1, 20: 103.1, 48: 100.0, 64: 99.9, "xla": 200.0}, {"sms": 48}),
        ({64: 100.0, 8: 300.0, "xla": 200.0}, {"sms": 64}),
        # More SMs do not help.
        ({8: 100.0, 16: 120.0, 64: 140.0, "xla": 200.0}, {"sms": 8}),
        # The pick is no slower than `xla`. If `xla` is the fastest, it takes the exchange.
        ({20: 102.0, 24: 101.0, 48: 100.0, "xla": 101.5}, {"sms": 24}),
        ({20: 102.0, 24: 101.0, 48: 100.0, "xla": 100.0}, {"sms": 48}),
        ({20: 102.0, 24: 104.0, 48: 100.0, "xla": 99.9}, {"sms": 20, "backend": "xla"}),
        ({20: 1125.0, 48: 641.0, 64: 494.0, "xla": 677.0}, {"sms": 64}),
        ({20: 1125.0, 48: 741.0, 64: 694.0, "xla": 677.0}, {"sms": 64, "backend": "xla"}),
        ({20: 549.0, 48: 260.0, 64: 253.0, "xla": 3000.0}, {"sms": 48}),
    ],
)
def test_tune_picks_the_smallest_number_near_the_fastest(us, expected):
    assert tune.pick_budget(us) == expected
    assert tune.pick_budget(dict(reversed(us.items()))) == expected


def test_tune_writes_what_groups_read(monkeypatch, tmp_path, write_tables):
    """Times are measured, picked, written beside the other part, and read, without GPUs."""
    path = write_tables(("cpu", R, OLD | {"commit": "older"}), ("b", 2, plain(1)))
    original_open, original_session = jax_ep.Group.open, tune.Session

    def open_as_cuda(*args, **kwargs):
        group = original_open(*args, **kwargs)
        group.backend = "cuda"
        return group

    def session_on_cpu(*args, **kwargs):
        return original_session(*args, **kwargs | {"backends": ["cpu"]})

    times = {8: 50.0, 16: 40.5, 24: 40.0}
    rows_of = original_session.measure_budgets
    seen = []

    def rows_with_times(self, point, budgets, progress):
        """Makes times with an obvious choice: `xla` is faster only at combine."""
        rows = rows_of(self, point, budgets, progress)
        for row in rows:
            seen.append((row.record.op, row.record.layout, row.record.backend, row.record.sms))
            stock_us = 39.0 if row.record.op == "combine" else 41.0
            row.record.us["p50"] = times[row.record.sms] if row.record.sms else stock_us
        return rows

    monkeypatch.setattr(jax_ep.Group, "open", open_as_cuda)
    monkeypatch.setattr(tune, "Session", session_on_cpu)
    monkeypatch.setattr(original_session, "measure_budgets", rows_with_times)
    monkeypatch.setattr(tune, "_SMS", (8, 16, 24))
    monkeypatch.setattr(session, "_BUDGET_COUNT", 2)
    args = Namespace(
        out=path,
        records=tmp_path / "records",
        parts=["exchanges"],
        most_mib=1,
        shape="tiny",
        ranks=R,
        plot=False,
        repeats=2,
        commit="newer",
    )
    tune.main(args)
    ways = [("cpu", 8), ("cpu", 16), ("cpu", 24), ("xla", None)]
    assert seen == [
        (exchange, layout, *way)
        for layout in ("rank", "expert")
        for exchange in tables.EXCHANGES
        for way in ways
    ]
    monkeypatch.setattr(jax_ep.Group, "open", original_open)
    with jax_ep.Group.open(make_mesh(R), "ep", name="tuned_budgets") as group:
        info = group.info()
        assert info.budgets == {
            "dispatch": {"rank": 16, "expert": 16},
            "cached_dispatch": {"rank": 16, "expert": 16},
            "combine": {"rank": "xla", "expert": "xla"},
        }
        assert f"JAX_EP_TUNING={path}, cpu, {R} ranks: " in info.budgets_from
        assert "commit newer" in info.budgets_from
    written = {t["device"]: t for t in json.loads(path.read_text())["tables"]}
    assert (written["cpu"]["ops"], written["cpu"]["commit"]) == (OLD["ops"], "older")
    assert written["b"]["budgets"] == plain(1)["budgets"]
    medians = {"8": 50.0, "16": 40.5, "24": 40.0, "xla": 39.0}
    assert written["cpu"]["measured"]["combine"]["expert"] == medians
    (records,) = (tmp_path / "records").glob("*-dispatch-cached_dispatch-combine.jsonl")
    assert len(records.read_text().splitlines()) == len(seen)


def test_tune_keeps_the_part_that_it_does_not_measure(tmp_path):
    path = tmp_path / "t.json"
    own = {"device": "a", "num_ranks": 2}
    tune._write(path, own | plain(1) | {"measured": {"combine": {"rank": {"8": 1.0}}}})
    tune._write(path, own | OLD | {"commit": "c", "measured": {"all_reduce": {"8": {}}}})
    tune._write(path, own | plain(11) | {"measured": {"combine": {"rank": {"8": 2.0}}}})
    assert len(path.read_text().splitlines()) == 3  # the table is one line
    (entry,) = json.loads(path.read_text())["tables"]
    assert entry == own | OLD | plain(11) | {
        "commit": "c",
        "measured": {"combine": {"rank": {"8": 2.0}}, "all_reduce": {"8": {}}},
    }
