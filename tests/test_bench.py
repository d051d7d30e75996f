"""The benchmark: contenders compute the same, counts are right, records are complete.

No test here looks at a time.
"""

import argparse
import ctypes
import json
import os
import runpy
import subprocess
import sys
import types
import typing
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import jax
import pytest
from process_programs import path_of
from scripts import BENCHMARKS, load_script

import jax_ep
from jax_ep import __main__
from jax_ep.bench import floor, reduce, report, steps, timing
from jax_ep.bench import run as bench
from jax_ep.bench.record import Place, Record, find_place
from jax_ep.testing import launch

ROOT = Path(__file__).parent.parent
OPS = ["dispatch", "combine", "round_trip"]
ALL_OPS = [*OPS, "cached_dispatch"]
TINY = ["--tokens", "16", "--hidden", "32", "--repeats", "2", "--backends", "cpu"]


def _is_a(value, annotation):
    if isinstance(annotation, types.UnionType):
        return any(_is_a(value, kind) for kind in annotation.__args__)
    if is_dataclass(annotation):
        kinds = typing.get_type_hints(annotation)
        return (
            isinstance(value, dict)
            and list(value) == list(kinds)
            and all(_is_a(value[name], kind) for name, kind in kinds.items())
        )
    if typing.get_origin(annotation) is dict:
        _, kind = typing.get_args(annotation)
        return isinstance(value, dict) and all(_is_a(v, kind) for v in value.values())
    return type(value) is annotation


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """Returns the records of the command, run as by a user: no environment set, on a CPU."""
    out = tmp_path_factory.mktemp("bench")
    command = [sys.executable, "-m", "jax_ep", "bench", *OPS, *TINY, "--ranks", "4", "--plot"]
    command += ["--layout", "both", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for text in ("memcpy, all cores", "floor us", "empty us", "12 records appended"):
        assert text in done.stdout
    assert "dispatch tiny" in done.stderr
    (path,) = out.glob("*-dispatch-combine-round_trip.jsonl")
    assert path.with_name(f"{path.stem}-tokens.png").read_bytes().startswith(b"\x89PNG")
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def reduce_records(tmp_path_factory):
    """Returns the records of the all_reduce family from the same command, in short chains."""
    out = tmp_path_factory.mktemp("bench")
    command = ["bench", *reduce.OPS, "--kib", "0.25", "2", "--hidden", "256", "--dtype", "f32"]
    command += ["--ranks", "2", "--repeats", "2", "--backends", "cpu", "--plot", "--commit", "c"]
    command += ["--algorithms", "low_latency", "two_shot", "psum", "--out", str(out)]
    command += ["--delay-us", "300", "--steps", "4"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [__main__.__file__, *command])
        patch.setattr(reduce, "_STEPS", 3)
        patch.setattr(steps, "_LINKS", 6)
        patch.setattr(floor, "_COPY_BYTES", 1 << 20)
        __main__.main()
    (path,) = out.glob("*-all_reduce-reduce_scatter-all_gather-*.jsonl")
    image = path.with_name(f"{path.stem}-bytes.png")
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


def test_records_are_complete(records):
    for record in records:
        _check_whole(record)
        assert record["command"].startswith("python -m jax_ep bench dispatch")
        assert record["steps"] is None  # CPUs time single steps if they are told to
        assert (record["num_ranks"], record["tokens"], record["hidden"]) == (4, 16, 32)


def test_records_of_all_reduce_are_complete(reduce_records):
    for record in reduce_records:
        _check_whole(record)
        assert record["command"].startswith("python -m jax_ep bench all_reduce")
        assert record["steps"]["count"] >= 4
        assert record["steps"]["delay_us"] == 300
        assert set(record["steps"]["us"]) == set(record["steps"]["delayed_us"])
        # If a commit is named, nobody knows whether its tree was clean.
        assert (record["commit"], record["dirty"]) == ("c", None)
        assert (record["num_ranks"], record["num_processes"]) == (2, 1)
        kib = record["tokens"] * record["hidden"] * 4 / 1024
        assert record["shape"] == f"{kib:g} KiB"
        assert record["floor_us"] > 0
        assert record["bytes"] >= 2 * kib * 1024
        assert record["xla_flags"] == os.environ.get("XLA_FLAGS", "")


def test_contenders_of_a_size_share_a_run(reduce_records):
    runs: dict[str, list[Any]] = {}
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
    # 0.25 KiB are less than one row of 256 elements.
    assert seen == [(op, s) for op in expected for s in sizes if (op, s) != (norm, sizes[0])]


def test_contenders_of_a_point_share_a_run(records):
    runs: dict[str, list[Any]] = {}
    for record in records:
        runs.setdefault(record["run"], []).append(record)
    assert len(runs) == 6
    for run in runs.values():
        assert len({(r["op"], r["layout"], r["floor_us"], r["bytes"]) for r in run}) == 1
        stock = "all_to_all" if run[0]["layout"] == "expert" else "all_gather"
        assert [(r["contender"], r["backend"]) for r in run] == [("jax_ep", "cpu"), (stock, "xla")]


def test_unknown_operations_are_refused():
    command = [sys.executable, "-m", "jax_ep", "bench", "tango"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode != 0
    assert "got 'tango'" in done.stderr


def test_bench_measures_all_operations_by_default():
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    pairs = list(bench.make_pairs(parser.parse_args([]), 8))
    assert list(dict.fromkeys(op for op, _ in pairs)) == [*timing.OPS, *reduce.OPS]
    with pytest.raises(jax_ep.ConfigError, match="fp8 rows are dispatched only"):
        list(bench.make_pairs(parser.parse_args(["all_reduce", "--dtype", "fp8"]), 8))


def test_steps_are_timed_where_they_are_asked_for():
    def count(*arguments):
        parser = argparse.ArgumentParser()
        bench.add_arguments(parser)
        return bench.count_steps(parser.parse_args(list(arguments)))

    assert count() == 0  # on a CPU
    assert count("--steps", "7") == 7
    assert count("--delay-us", "50") == 1000
    assert count("--delay-us", "50", "--steps", "7") == 7
    for delay in ("0", "-1", "1000001"):
        with pytest.raises(jax_ep.ConfigError, match="--delay-us must be 1 to 1000000"):
            count("--delay-us", delay)
    for wrong in (["--steps", "-1"], ["--steps", "0", "--delay-us", "50"]):
        with pytest.raises(jax_ep.ConfigError, match="--steps must be positive"):
            count(*wrong)


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
    """A record has the fields of all records, a line for each way, and one run for each point."""
    arguments, sizes, contenders = SCRIPTS[name]
    path = BENCHMARKS / f"{name}.py"
    monkeypatch.setattr(sys, "argv", [str(path), *arguments, "--out", str(tmp_path)])
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))  # two scripts add to it
    script = load_script(name)
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


def test_halves_say_what_is_hidden(tmp_path, monkeypatch, capsys):
    path = ROOT / "benchmarks" / "halves.py"
    sizes = "--tokens 2 --hidden 128 --width 8 --experts 8 --topk 2 --steps 2 --delay-us 3000"
    monkeypatch.setattr(sys, "argv", [str(path), *sizes.split(), "--out", str(tmp_path)])
    monkeypatch.setattr("jax_ep.bench.steps._LINKS", 6)
    runpy.run_path(str(path), run_name="__main__")
    (written,) = tmp_path.glob("*-halves.jsonl")
    lines = [json.loads(line) for line in written.read_text().splitlines()]
    assert [line["contender"] for line in lines] == ["dispatch", "matmul", "in_turn", "halves"]
    for line in lines:
        # Whoever needs the late rank waits for it: on CPUs a receive is the whole exchange. The
        # matmul needs nobody, but may wait for a core.
        assert line["contender"] == "matmul" or line["us"]["p50"] > 2900, line
    assert "ranks late by 3000 us" in capsys.readouterr().out


def test_command_names_the_extra_that_brings_its_progress_bar(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)  # importing it raises ImportError
    with pytest.raises(jax_ep.ConfigError, match=r"needs tqdm: pip install 'jax_ep\[bench\]'"):
        report.progress(1)


def test_processes_take_turns_together():
    """The timed part does not include the wait for a process that comes late."""
    outputs = launch.launch([path_of("take_turns")], num_processes=2, deadline=100.0)
    assert all("passed\n" in output for output in outputs)


@pytest.mark.slow
def test_several_processes_write_one_record(tmp_path):
    command = ["bench", "all_reduce", "all_gather", "--kib", "1", "--repeats", "2"]
    command += ["--backends", "cpu", "--steps", "4", "--delay-us", "100", "--out", str(tmp_path)]
    outputs = launch.launch(
        [str(ROOT / "examples" / "04_processes.py"), str(Path(__main__.__file__)), *command],
        num_processes=2,
        num_devices=2,
        deadline=200.0,
    )
    assert "4 records appended" in outputs[0]
    assert "records appended" not in outputs[1]
    (path,) = tmp_path.glob("*-all_reduce-all_gather.jsonl")
    for line in path.read_text().splitlines():
        found = json.loads(line)
        _check_whole(found)
        assert (found["num_ranks"], found["num_processes"]) == (4, 2)
        assert found["steps"]["delay_us"] == 100
