"""The benchmark: what it compares is the same, what it counts is right, what it writes is whole.

No test here looks at a time.
"""

import argparse
import ctypes
import importlib.util
import json
import os
import subprocess
import sys
import types
import typing
from dataclasses import fields
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_ep
from jax_ep import __main__
from jax_ep.bench import floor, reduce, timing
from jax_ep.bench import run as bench
from jax_ep.bench.contenders import contenders, ours, ragged_all_to_all
from jax_ep.bench.record import Place, Record, find_place
from jax_ep.bench.shapes import Shape, make_inputs, make_point
from jax_ep.testing import launch
from jax_ep.testing.compare import assert_same_bits
from jax_ep.testing.ranks import on_ranks

ROOT = Path(__file__).parent.parent
OPS = ["dispatch", "combine", "round_trip"]
ALL_OPS = [*OPS, "cached_dispatch"]
TINY = ["--tokens", "16", "--hidden", "32", "--repeats", "2", "--backends", "cpu"]


def _point(layout, *, num_ranks=4, dtype="f32", hidden=32, balance="auto", alignment=1):
    shape = Shape(tokens=48, hidden=hidden, topk=3, experts=num_ranks * 4)
    return make_point(
        "test",
        shape,
        dtype=dtype,
        layout=layout,
        num_ranks=num_ranks,
        balance=balance,
        fill="zeros",
        alignment=alignment,
    )


def _is_a(value, annotation):
    if isinstance(annotation, types.UnionType):
        return any(_is_a(value, kind) for kind in annotation.__args__)
    if typing.get_origin(annotation) is dict:
        _, kind = typing.get_args(annotation)
        return isinstance(value, dict) and all(_is_a(v, kind) for v in value.values())
    return type(value) is annotation


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """What the command writes, run as a user runs it: no environment set, a CPU."""
    out = tmp_path_factory.mktemp("bench")
    command = [sys.executable, "-m", "jax_ep", "bench", *OPS, *TINY, "--ranks", "4", "--plot"]
    command += ["--layout", "both", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for text in ("memcpy, all cores", "floor us", "empty us", "12 records appended"):
        assert text in done.stdout
    assert "dispatch tiny" in done.stderr
    (path,) = out.glob("*-dispatch-combine-round_trip.jsonl")
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def reduce_records(tmp_path_factory):
    """What the same command writes of all_reduce and its relatives; in short chains."""
    out = tmp_path_factory.mktemp("bench")
    command = ["bench", *reduce.OPS, "--kib", "0.25", "2", "--hidden", "256", "--dtype", "f32"]
    command += ["--ranks", "2", "--repeats", "2", "--backends", "cpu", "--plot", "--commit", "c"]
    command += ["--algorithms", "low_latency", "two_shot", "psum", "--out", str(out)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [__main__.__file__, *command])
        patch.setattr(reduce, "_STEPS", 3)
        patch.setattr(floor, "_COPY_BYTES", 1 << 20)
        __main__.main()
    (path,) = out.glob("*-all_reduce-reduce_scatter-all_gather-*.jsonl")
    image = path.with_name(f"{path.stem}-sizes.png")
    assert image.read_bytes().startswith(b"\x89PNG")
    return [json.loads(line) for line in path.read_text().splitlines()]


def _check_whole(record):
    kinds = {f.name: typing.get_type_hints(Record)[f.name] for f in fields(Record)}
    assert list(record) == list(kinds)
    for name, kind in kinds.items():
        assert _is_a(record[name], kind), f"{name}: {record[name]!r}"
    assert set(record["us"]) == {"p50", "p10", "p90", "p99"}
    assert set(record["versions"]) == {"jax", "jaxlib", "driver", "nccl"}
    assert record["versions"]["jax"] == jax.__version__
    assert record["timing"] == "chain"


def test_records_are_whole(records):
    for record in records:
        _check_whole(record)
        assert record["command"].startswith("python -m jax_ep bench dispatch")
        assert (record["num_ranks"], record["tokens"], record["hidden"]) == (4, 16, 32)


def test_records_of_all_reduce_are_whole(reduce_records):
    for record in reduce_records:
        _check_whole(record)
        assert record["command"].startswith("python -m jax_ep bench all_reduce")
        # Whether the tree was clean is not known of a commit that was named.
        assert (record["commit"], record["dirty"]) == ("c", None)
        assert (record["num_ranks"], record["num_processes"]) == (2, 1)
        kib = record["tokens"] * record["hidden"] * 4 / 1024
        assert record["shape"] == f"{kib:g} KiB"
        assert record["floor_us"] > 0
        assert record["bytes"] >= 2 * kib * 1024
        assert record["xla_flags"] == os.environ["XLA_FLAGS"]


def test_contenders_of_a_size_share_a_run(reduce_records):
    runs = {}
    for record in reduce_records:
        runs.setdefault(record["run"], []).append(record)
    packets, two_shot = ("jax_ep", "low_latency"), ("jax_ep", "two_shot")
    expected = {
        "all_reduce": [packets, two_shot, ("psum", None)],
        "reduce_scatter": [packets, ("psum_scatter", None)],
        "all_gather": [packets, ("all_gather", None)],
        "all_reduce_residual_rmsnorm": [packets, ("psum", None)],
    }
    seen = []
    for run in runs.values():
        (op,) = {r["op"] for r in run}
        (shape,) = {r["shape"] for r in run}
        assert [(r["contender"], r["algorithm"]) for r in run] == expected[op]
        seen.append((op, shape))
    sizes = ["0.25 KiB", "2 KiB"]
    norm = "all_reduce_residual_rmsnorm"
    # 0.25 KiB are less than a row of 256.
    assert seen == [(op, s) for op in expected for s in sizes if (op, s) != (norm, sizes[0])]


def test_contenders_of_a_point_share_a_run(records):
    runs = {}
    for record in records:
        runs.setdefault(record["run"], []).append(record)
    assert len(runs) == 6
    for run in runs.values():
        assert len({(r["op"], r["layout"], r["floor_us"], r["bytes"]) for r in run}) == 1
        stock = "all_to_all" if run[0]["layout"] == "expert" else "all_gather"
        assert [(r["contender"], r["backend"]) for r in run] == [("jax_ep", "cpu"), (stock, "xla")]


def test_refuses_unknown_operations():
    command = [sys.executable, "-m", "jax_ep", "bench", "tango"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode != 0
    assert "got 'tango'" in done.stderr


def test_bench_means_all_operations():
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    pairs = list(bench.make_pairs(parser.parse_args([]), 8))
    assert list(dict.fromkeys(op for op, _ in pairs)) == [*timing.OPS, *reduce.OPS]
    with pytest.raises(jax_ep.ConfigError, match="fp8 rows are dispatched only"):
        list(bench.make_pairs(parser.parse_args(["all_reduce", "--dtype", "fp8"]), 8))


@pytest.mark.parametrize(
    ("layout", "platform", "processes", "names"),
    [
        ("rank", "gpu", [0, 0], ["all_gather"]),
        ("expert", "cpu", [0, 0], ["all_to_all"]),
        ("expert", "gpu", [0, 0], ["all_to_all", "ragged_all_to_all"]),
        ("expert", "gpu", [0, 1], ["all_to_all"]),
    ],
)
def test_stock_contenders_are_those_that_xla_has(layout, platform, processes, names):
    devices = [types.SimpleNamespace(platform=platform, process_index=i) for i in processes]
    mesh = types.SimpleNamespace(devices=np.array(devices))
    group = types.SimpleNamespace(mesh=mesh, axes=("ep",))
    assert [c.name for c in contenders(_point(layout), group, [])] == names


def _ragged_all_to_all(rows, out, first_in, send, first_out, recv, *, axis_name):
    """lax.ragged_all_to_all, which XLA does not have for CPUs."""
    me = jax.lax.axis_index(axis_name)
    rows, first_in, send, first_out = (
        jax.lax.all_gather(a, axis_name) for a in (rows, first_in, send, first_out)
    )
    i = jnp.arange(out.shape[0])
    for src in range(rows.shape[0]):
        nth = i - first_out[src, me]
        is_sent = (nth >= 0) & (nth < send[src, me])
        sent = rows[src, jnp.clip(first_in[src, me] + nth, 0, rows.shape[1] - 1)]
        out = jnp.where(is_sent[:, None], sent, out)
    return out


@pytest.mark.parametrize("contender", ["all_to_all", "ragged_all_to_all", "all_gather"])
def test_stock_contender_computes_the_same(groups, contender, monkeypatch):
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", _ragged_all_to_all)
    layout = "rank" if contender == "all_gather" else "expert"
    group, point = groups(4), _point(layout, balance=None)
    inputs = make_inputs(point, group.mesh)

    def run(contender):
        def both(x, ids, weights):
            out = contender.dispatch(x, ids, weights)
            return out, contender.combine(out)

        return on_ranks(both, group.mesh, check_vma=False)(*inputs)

    us, stock = contenders(point, group, [("cpu", None)])
    if contender.startswith("ragged"):
        stock = ragged_all_to_all(point, group.axes)
    assert stock.name == contender
    (out, y), (other, other_y) = run(us), run(stock)
    other = other.exchanged if contender.startswith("ragged") else other
    assert not np.any(out.num_dropped)
    if layout == "expert":
        assert_same_bits(other.group_sizes, out.group_sizes, what="group_sizes")
        for got, expected, num_recv in zip(other.rows, out.x, out.num_recv, strict=True):
            n = int(num_recv[0])
            assert_same_bits(got[:n], expected[:n], what="rows")
            assert not np.any(got[n:])
    else:
        for got, expected, src in zip(other.rows, out.x, out.handle.recv_src, strict=True):
            assert_same_bits(got[src[src >= 0]], expected[src >= 0], what="rows")
    np.testing.assert_allclose(other_y, y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", ["expert", "rank"])
def test_fp8_rows_and_scales_arrive_alike(groups, layout):
    group, point = groups(4), _point(layout, dtype="fp8", hidden=256, balance=None)
    assert point.row_bytes == 256 + 8
    inputs = make_inputs(point, group.mesh)
    us, stock = contenders(point, group, [("cpu", None)])
    out, other = (on_ranks(c.dispatch, group.mesh, check_vma=False)(*inputs) for c in (us, stock))
    for ours_, theirs in zip((out.x, out.scales), other.rows, strict=True):
        for got, expected, src in zip(theirs, ours_, out.handle.recv_src, strict=True):
            if layout == "rank":
                assert_same_bits(got[src[src >= 0]], expected[src >= 0])
            else:
                n = int(np.sum(src >= 0))
                assert_same_bits(got[:n], expected[:n])


@pytest.mark.parametrize("op", ALL_OPS)
@pytest.mark.parametrize("layout", ["expert", "rank"])
def test_chain_computes_the_operation(groups, op, layout):
    """Links of a chain do what they are timed for, and the empty chain changes nothing."""
    group, point = groups(2), _point(layout, num_ranks=2)
    program = timing.make_program(op, ours(point, group, "cpu", None))
    inputs = make_inputs(point, group.mesh)

    def run(link, count):
        def chain(*own):
            return timing.make_chain(op, link, count)(program.start(*own))

        return on_ranks(chain, group.mesh, check_vma=False)(*inputs)

    start = on_ranks(program.start, group.mesh, check_vma=False)(*inputs)
    by_hand = on_ranks(lambda c: program.run(*c), group.mesh, check_vma=False)
    expected = start
    for _ in range(3):
        expected = timing.Carry(start.given, by_hand(expected))
    for link, end in {program.run: expected, timing.no_op: start}.items():
        for got, want in zip(jax.tree.leaves(run(link, 3)), jax.tree.leaves(end), strict=True):
            assert_same_bits(got, want)


@pytest.mark.parametrize("op", ALL_OPS)
@pytest.mark.parametrize("layout", ["expert", "rank"])
def test_nothing_is_hoisted_out_of_a_chain(groups, op, layout):
    """Every collective is inside the loop, not in the entry computation."""
    group, point = groups(2), _point(layout, num_ranks=2)
    inputs = make_inputs(point, group.mesh)
    for contender in contenders(point, group, [("xla", None)]):
        if op == "cached_dispatch" and contender.again is None:
            continue
        program = timing.make_program(op, contender)
        start = on_ranks(program.start, group.mesh, check_vma=False)(*inputs)
        chain = on_ranks(timing.make_chain(op, program.run, 4), group.mesh, check_vma=False)
        text = chain.lower(start).compile().as_text()
        entry = text[text.index("\nENTRY ") :].partition("\n}")[0]
        for name in ("all-gather(", "all-to-all(", "reduce-scatter("):
            assert name not in entry, contender.name
        assert "all-gather(" in text or "all-to-all(" in text or "reduce-scatter(" in text


RECV_SRC = np.array([[1, 3, -1, -1], [0, 0, 1, 2]])


def test_floor_arithmetic():
    shape = Shape(tokens=2, hidden=8, topk=2, experts=4)
    point = make_point(
        "hand", shape, dtype="f32", layout="expert", num_ranks=2, balance=None, fill="zeros"
    )
    assert point.row_bytes == 32
    expected = {
        # rows: wire, read, read_once, written
        "dispatch": ([1, 2], [2, 4], [2, 3], [2, 4]),
        "cached_dispatch": ([1, 2], [2, 4], [2, 3], [2, 4]),
        "combine": ([2, 1], [2, 4], [2, 4], [2, 2]),
        "round_trip": ([3, 3], [4, 8], [4, 7], [4, 6]),
    }
    for op, rows in expected.items():
        moved = floor.traffic(op, point, RECV_SRC)
        got = (moved.wire, moved.read, moved.read_once, moved.written)
        np.testing.assert_array_equal(np.array(got), np.array(rows) * 32, err_msg=op)
    moved = floor.traffic("dispatch", point, RECV_SRC)
    assert floor.cpu_floor_us(moved, 1e6) == pytest.approx(6 * 32)  # six rows copied, 1 byte/us
    hbm = 7 * 32 / (2 * floor.HBM_COPY_BYTES_PER_S)
    wire = 2 * 32 / floor.NVLINK_BYTES_PER_S
    assert floor.gpu_floor_us(moved) == pytest.approx(1e6 * max(hbm, wire))


def test_nccl_is_named(monkeypatch):
    class Loaded:
        @staticmethod
        def ncclGetVersion(code):
            code._obj.value = 22907

    monkeypatch.setattr(ctypes, "CDLL", lambda name, mode: Loaded)
    assert find_place("c").versions["nccl"] == "2.29.7"

    def none(name, mode):
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", none)
    known = {"nvidia-nccl-cu12": "2.27.3"}
    monkeypatch.setattr("jax_ep.bench.record._version_of_wheel", known.get)
    assert find_place("c").versions["nccl"] == "2.27.3"
    known.clear()
    assert find_place("c").versions["nccl"] is None


SCRIPTS = {
    "decode_layer": (
        ["--batch", "1"],
        {"HIDDEN": 128, "INTERMEDIATE": 256, "LAYERS": 2, "RUNS": 2},
        ["psum", "jax_ep", "no_sum"],
    ),
    "overlap": (
        ["--shape", "tiny", "--width", "8", "--sms", "4"],
        {"STEPS": 2, "RUNS": 2},
        ["dispatch", "matmul", "in_turn", "beside"],
    ),
    "host_time": (
        [],
        {"TOKENS": 8, "HIDDEN": 16, "TOPK": 2, "FEW": 1, "MANY": 3, "RUNS": 2},
        ["jax_ep"] * 8,
    ),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_write_records(name, tmp_path, monkeypatch):
    """With what all records have, one line for each way; contenders of a point share a run."""
    arguments, sizes, contenders = SCRIPTS[name]
    path = ROOT / "benchmarks" / f"{name}.py"
    monkeypatch.setattr(sys, "argv", [str(path), *arguments, "--out", str(tmp_path)])
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"])  # which two of them add to
    spec = importlib.util.spec_from_file_location(name, path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    for size, value in sizes.items():
        monkeypatch.setattr(script, size, value)
    script.main()
    (written,) = tmp_path.glob(f"*-{name}.jsonl")
    lines = [json.loads(line) for line in written.read_text().splitlines()]
    assert [line["contender"] for line in lines] == contenders
    assert len({line["run"] for line in lines}) == (4 if name == "host_time" else 1)
    kinds = typing.get_type_hints(Record)
    shared = {f.name for f in fields(Place)}
    shared |= {"op", "contender", "backend", "num_ranks", "dtype", "us", "timing", "run"}
    for line in lines:
        assert shared <= set(line)
        assert all(_is_a(line[field], kinds[field]) for field in shared)
        assert line["op"] == name
        assert set(line["us"]) == {"p50", "p10", "p90", "p99"}
        assert line["command"].startswith(f"python {path}")


TURNS = """
import time
from jax_ep.testing import launch
launch.initialize()
import jax
from jax_ep.bench.timing import take_turns
begun = []
def run():
    begun.append(time.monotonic())
    return 1.0 + jax.process_index()
taken = take_turns([run], repeats=3, tick=lambda: time.sleep(2 * jax.process_index()))
assert taken.tolist() == [[2.0] * 3], taken
assert begun[2] - begun[1] > 1, begun  # process 0 too, which does not sleep
print("passed")
"""


def test_processes_take_turns_together():
    """One that comes late is waited for outside what is timed."""
    outputs = launch.launch(["-c", TURNS], num_processes=2, deadline=100.0)
    assert all("passed\n" in output for output in outputs)


@pytest.mark.slow
def test_several_processes(tmp_path):
    command = ["bench", "all_reduce", "all_gather", "--kib", "1", "--repeats", "2"]
    command += ["--backends", "cpu", "--out", str(tmp_path)]
    outputs = launch.launch(
        [str(ROOT / "examples" / "multi_host.py"), str(Path(__main__.__file__)), *command],
        num_processes=2,
        deadline=200.0,
        environment={"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "PJRT_NPROC": "16"},
    )
    assert "4 records appended" in outputs[0]
    assert "records appended" not in outputs[1]
    (path,) = tmp_path.glob("*-all_reduce-all_gather.jsonl")
    for line in path.read_text().splitlines():
        found = json.loads(line)
        _check_whole(found)
        assert (found["num_ranks"], found["num_processes"]) == (4, 2)


def test_capacity_defaults():
    assert _point("rank").recv_capacity == 48 * 4
    assert _point("expert").recv_capacity == 48 * 3 * 5 // 4
    assert _point("expert", balance=None).recv_capacity == 48 * 4 * 3
    assert _point("expert", alignment=8).recv_capacity == 48 * 3 * 5 // 4 + 4 * 7
    assert _point("expert", alignment=8).expert_alignment == 8
    assert _point("rank", alignment=8).expert_alignment == 1
    assert _point("expert", dtype="bf16").row_bytes == 32 * jnp.dtype(jnp.bfloat16).itemsize
