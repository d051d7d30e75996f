"""The model of costs: what routings send, units, its constants, published rows, the command."""

import sys
from pathlib import Path

import numpy as np
import pytest

from jax_ep import ShapeError, __main__, reference
from jax_ep.bench import fit, model
from jax_ep.bench.published import Published, group, read_published, summarize
from jax_ep.testing import routing

ROOT = Path(__file__).parent.parent
H200 = model.MACHINES["h200"]
ROWS = read_published(ROOT / "benchmarks" / "published.csv")
TESTED = [row for row in ROWS if not row.fitted]
PLAIN = model.Kernel(launch_us=0.0, nvlink_share=1.0)
SMALL = {"num_ranks": 8, "ranks_per_node": 2, "hidden": 64, "topk": 3, "experts": 32}


@pytest.mark.parametrize(("topk", "max_groups"), [(3, 1), (6, 2), (6, 3), (1, 3)])
def test_group_limited_routing_takes_the_best_groups(topk, max_groups):
    ids = routing.group_limited(
        np.random.default_rng(0), (2, 2000, topk), 32, num_groups=8, max_groups=max_groups
    )
    groups = np.sort(ids // 4, axis=-1)
    assert ids.dtype == np.int32
    assert (np.diff(np.sort(ids, axis=-1), axis=-1) > 0).all()
    num_groups = 1 + (np.diff(groups, axis=-1) > 0).sum(axis=-1)
    assert np.max(num_groups) == min(topk, max_groups)
    counts = np.bincount(ids.reshape(-1), minlength=32)
    assert np.min(counts) > 0.6 * np.max(counts)
    # The same scores decide which groups these are.
    scores = np.random.default_rng(0).random((2, 2000, 8, 4))
    best_two = np.sort(scores, axis=-1)[..., 2:].sum(axis=-1)
    best_groups = np.argsort(-best_two, axis=-1)[..., :max_groups]
    assert (groups[..., None] == best_groups[..., None, :]).any(axis=-1).all()
    expert = np.take_along_axis(scores.reshape(2, 2000, 32), ids, axis=-1)
    allowed = np.take_along_axis(scores, best_groups[..., None], axis=2).reshape(2, 2000, -1)
    np.testing.assert_array_equal(expert, -np.sort(-allowed, axis=-1)[..., :topk])


def _limited(rng, shape, num_experts, num_nodes, max_nodes):
    """Draws the nodes of each token, and then its experts from theirs."""
    scores = rng.random((*shape[:2], num_nodes))
    allowed = np.argsort(scores, axis=-1).argsort(axis=-1) < max_nodes
    allowed = np.repeat(allowed, num_experts // num_nodes, axis=-1)
    keys = np.where(allowed, rng.random(allowed.shape), 2.0)
    return np.argsort(keys, axis=-1)[..., : shape[2]].astype(np.int32)


@pytest.mark.parametrize("max_nodes", [None, 2, 1])
def test_expected_bytes_are_those_of_drawn_routings(max_nodes):
    exchange = model.Exchange(**SMALL, tokens=500, max_nodes=max_nodes)
    rng, shape = np.random.default_rng(0), (8, 500, 3)
    if max_nodes is None:
        ids = routing.balanced(rng, shape, 32)
    else:
        ids = _limited(rng, shape, 32, num_nodes=4, max_nodes=max_nodes)
    per_rank, per_node, per_expert, _ = reference.get_dispatch_layout(
        ids, num_experts=32, ranks_per_node=2
    )
    assert exchange.nodes_of_a_token() == pytest.approx(per_node.sum() / 4000, rel=0.02)
    assert exchange.ranks_of_a_token() == pytest.approx(per_rank.sum() / 4000, rel=0.02)
    # What leaves a rank for other nodes, and what a node's ranks send one another: a row comes to
    # its node at the rank of its sender's index.
    source, destination = np.indices((8, 8))
    own_node = np.arange(4) == np.arange(8)[:, None] // 2
    far = per_node[~own_node].sum() / 8
    near = per_rank[source % 2 != destination % 2].sum() / 8
    found = model.traffic(PLAIN, exchange)
    assert found.network_bytes == pytest.approx(far * 128, rel=0.03)
    assert found.nvlink_bytes == pytest.approx(near * 128, rel=0.03)
    assert (found.network_flags, found.nvlink_flags) == (3, 1)
    by_expert = model.traffic(PLAIN._replace(rows=model.Rows.EXPERT), exchange)
    choices = per_expert.reshape(8, 8, 4).sum(axis=-1)
    is_far = source // 2 != destination // 2
    is_near = ~is_far & (source != destination)
    assert by_expert.network_bytes == pytest.approx(choices[is_far].sum() / 8 * 128, rel=0.03)
    assert by_expert.nvlink_bytes == pytest.approx(choices[is_near].sum() / 8 * 128, rel=0.08)
    assert (by_expert.network_flags, by_expert.nvlink_flags) == (6, 1)


def test_expected_numbers_are_right_where_they_are_known():
    assert model.expected_distinct(8, 256, 1) == pytest.approx(1)
    assert model.expected_distinct(8, 8, 8) == pytest.approx(8)
    assert model.expected_distinct(2, 256, 8) == pytest.approx(1.9930, abs=1e-4)
    # One choice of two ranks: half of the tokens stay.
    pair = model.Exchange(num_ranks=2, ranks_per_node=2, topk=1, experts=2, tokens=10, hidden=8)
    assert model.traffic(PLAIN, pair) == pytest.approx((0, 10 / 2 * 16, 0, 1))


def test_bytes_and_rates_have_their_units():
    exchange = model.Exchange(num_ranks=16, ranks_per_node=8, tokens=1000, hidden=1024)
    machine = model.Machine(nvlink=100, nic=10)
    found = model.predict(PLAIN, exchange, machine)
    assert found.nvlink_us == pytest.approx(found.traffic.nvlink_bytes / 100e9 * 1e6)
    rate = 10e9 * model.NETWORKS["cx7"].share
    assert found.network_us == pytest.approx(found.traffic.network_bytes / rate * 1e6)
    assert found.us > max(found.network_us, found.nvlink_us)
    twice = model.predict(PLAIN, exchange, machine._replace(nic=20))
    assert twice.network_us == pytest.approx(found.network_us / 2)
    in_turn = model.predict(PLAIN._replace(is_pipelined=False), exchange, machine)
    assert in_turn.us - found.us == pytest.approx(min(found.network_us, found.nvlink_us))
    assert [of(7168) for of in model.ROW_BYTES.values()] == [14336, 7392, 4032]


def test_ids_and_packets_are_counted():
    exchange = model.Exchange(**SMALL, tokens=100)
    rows = model.traffic(PLAIN, exchange)
    with_ids = model.traffic(PLAIN._replace(reads_ids=True), exchange)
    # Of 8 ranks: 3 are read over the network, and 4 come from the other rank of the node.
    assert with_ids.network_bytes - rows.network_bytes == pytest.approx(3 * 100 * 3 * 4)
    assert with_ids.nvlink_bytes - rows.nvlink_bytes == pytest.approx(4 * 100 * 3 * 4)
    packets = model.traffic(PLAIN._replace(nvlink_bytes=4 / 3), exchange)
    assert packets.nvlink_bytes == pytest.approx(rows.nvlink_bytes * 4 / 3)
    assert packets.network_bytes == rows.network_bytes


@pytest.mark.parametrize("mode", model.MODES)
@pytest.mark.parametrize("op", model.OPS)
def test_more_takes_longer(op, mode):
    kernel = model.OURS[mode, op]
    base = model.Exchange(num_ranks=1, ranks_per_node=1, tokens=128)

    def us(num_ranks, **changes):
        sizes = {"tokens": 128, "hidden": 7168, **changes}
        base = model.Exchange(num_ranks=1, ranks_per_node=1, **sizes)
        return model.predict(kernel, model.grow(base, num_ranks, H200), H200).us

    for times in (
        [us(n) for n in (1, 2, 8, 16, 64, 256, 2048)],
        [us(64, tokens=n) for n in (1, 8, 128, 4096)],
        [us(64, hidden=n) for n in (1024, 7168)],
        [us(64, dtype=n) for n in ("fp8", "bf16")],
        [us(64, max_nodes=n) for n in (1, 2, 4, 7, None)],
    ):
        assert times == sorted(set(times))
    assert us(64, max_nodes=8) == us(64)
    assert model.grow(base, 2048, H200).experts == 2048


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"num_ranks": 7}, "num_ranks=7 must be a positive multiple of 2"),
        ({"num_ranks": 0}, "num_ranks=0 must be"),
        ({"experts": 12}, "experts=12 must be a positive multiple of 8"),
        ({"max_nodes": 0}, "max_nodes must be positive"),
        ({"tokens": 0}, "tokens must be positive, got 0"),
        ({"topk": 17, "max_nodes": 2}, "topk=17 must be 1 to 16"),
    ],
)
def test_sizes_that_do_not_fit_raise(changes, text):
    with pytest.raises(ShapeError, match=text):
        model.Exchange(**SMALL | changes)


@pytest.mark.parametrize("num_ranks", [0, 12])
def test_numbers_of_ranks_that_no_machine_has_raise(num_ranks):
    base = model.Exchange(num_ranks=1, ranks_per_node=1)
    with pytest.raises(ShapeError, match=f"num_ranks={num_ranks} must be"):
        model.grow(base, num_ranks, H200)


def test_published_rates_count_what_their_source_counts():
    # UCCL-EP gives both for 8 ranks of H200: 320 GB/s and 500 us, 319 and 973.
    near = model.Exchange(num_ranks=8, ranks_per_node=8)
    for dtype, rate, us in (("fp8", 320, 500), ("bf16", 319, 973)):
        exchange = model.Exchange(num_ranks=8, ranks_per_node=8, dtype=dtype)
        row = _published(exchange, value=rate, counts="RANK_ROWS_INCL")
        assert row.us == pytest.approx(us, rel=0.02)
    # DeepEP V1 gives both for few tokens on 8 ranks: 98 GB/s in 77 us.
    few = model.Exchange(num_ranks=8, ranks_per_node=8, tokens=128, dtype="fp8")
    assert _published(few, value=98, counts="EXPERT_ROWS").us == pytest.approx(77, rel=0.01)
    assert _published(near, value=123.0, unit="us", counts="").us == 123.0


def _published(exchange, **changes):
    facts = {"system": "s", "machine": "h200", "mode": "throughput", "op": "dispatch"}
    facts |= {"rows": model.Rows.NODE, "unit": "GB/s", "fitted": "", "source": "", "note": ""}
    return Published(exchange=exchange, **facts | changes)


@pytest.fixture
def pages(monkeypatch):
    """Returns the part of benchmarks/pages that makes the tables of the model."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "pages"))
    import scale

    yield scale
    for name in ("scale", "records"):
        sys.modules.pop(name, None)


def test_constants_are_those_of_the_fits(pages):
    found, shipped = pages.refit(), pages.shipped()
    assert list(found) == list(shipped)
    for name, value in found.items():
        assert shipped[name] == pytest.approx(value, rel=0.02), name


def test_our_records_that_were_not_fitted_are_near(pages):
    errors = []
    for (mode, op, *_), records in pages.other_records().items():
        predicted = model.predict(model.OURS[mode, op], fit.exchange_of(records[0]), H200).us
        errors.append(predicted / float(np.median([r["us"]["p50"] for r in records])) - 1)
    assert len(errors) >= 30
    assert np.median(np.abs(errors)) < 0.10
    assert np.max(np.abs(errors)) < 0.50


def test_other_libraries_on_our_gpus_are_near(pages):
    rows = [row for row in pages.rivals_for_few() if "DeepEP V2" not in row[0]]
    errors = [predicted / measured - 1 for *_, measured, predicted in rows]
    assert len(errors) == 28
    assert np.median(np.abs(errors)) < 0.10
    assert np.max(np.abs(errors)) < 0.30


# docs/scale.md says these numbers.
@pytest.mark.parametrize(
    ("level", "mode", "count", "size"),
    [
        ("NVLink", "throughput", 28, 0.11),
        ("NVLink", "low_latency", 52, 0.29),
        ("cx7", "throughput", 34, 0.05),
        ("cx7", "low_latency", 23, 0.04),
        ("efa", "throughput", 49, 0.11),
        ("efa", "low_latency", 40, 0.56),
    ],
)
def test_published_rows_are_within_the_stated_errors(level, mode, count, size):
    own = [r for (_, n, m), g in group(TESTED).items() if (n, m) == (level, mode) for r in g]
    sums = summarize(own)
    assert sums.num_rows == count
    assert sums.median_size < size


def test_published_rows_meet_the_aim_together():
    assert summarize(TESTED).median_size < 0.15
    assert {r.fitted for r in ROWS} == {"", "cx7 share", "cx7 start", "efa share"}
    assert len(ROWS) - len(TESTED) == 9
    assert all(r.source and r.us > 0 for r in ROWS)


def test_a_line_is_fitted_with_relative_errors():
    assert fit.fit_line([(0, 3), (1, 5), (10, 23)]) == pytest.approx((3, 2))
    # The far point counts little: its error of 10 is a tenth of it.
    start, slope = fit.fit_line([(0, 1), (1, 2), (99, 90)])
    assert start == pytest.approx(1, abs=0.1)
    assert slope == pytest.approx(0.9, abs=0.05)


def _run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["jax_ep", "model", *arguments])
    __main__.main()
    return capsys.readouterr().out.splitlines()


def test_the_command_predicts(monkeypatch, capsys):
    head, *lines, last = _run(
        monkeypatch, capsys, "--ranks", "8", "2048", "--dtype", "fp8", "--max-nodes", "4"
    )
    assert head.split()[:3] == ["operation", "ranks", "nodes"]
    assert [line.split()[:4] for line in lines] == [
        [op, dtype, ranks, nodes]
        for op, dtype in (("dispatch,", "fp8"), ("combine,", "bf16"))
        for ranks, nodes in (("8", "1"), ("2,048", "256"))
    ]
    exchange = model.Exchange(num_ranks=2048, ranks_per_node=8, experts=2048, max_nodes=4)
    us = model.predict(model.OURS["throughput", "combine"], exchange, H200).us
    assert lines[-1].split()[-2:] == [f"{us:,.0f}", "network"]
    assert "not measurements" in last


def test_the_command_takes_a_domain_and_prints_errors(monkeypatch, capsys):
    wide = ["--ranks", "64", "--ranks-per-node", "64", "--tokens", "128", "--machine", "gb200"]
    _, dispatch, _, _ = _run(monkeypatch, capsys, *wide)
    assert dispatch.split()[2:5] == ["64", "1", "0.0"]
    path = str(ROOT / "benchmarks" / "published.csv")
    *_, last = _run(monkeypatch, capsys, "--published", path)
    assert last.split()[-4:] == ["226", "-9%", "14%", "-92%"]
