"""One line of a result file: a contender at a point, and where and when it was measured."""

import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from jax_ep.bench.contenders import Contender
from jax_ep.bench.shapes import Point


@dataclass(frozen=True)
class Record:
    """What is kept of one contender at one point.

    `tokens`, `bytes`, `wire_bytes` and `extra_memory_bytes` are those of one rank, the busiest
    one; `us` is per operation, on the slowest rank, after subtraction of the empty chain.
    """

    op: str
    contender: str
    backend: str
    algorithm: str | None
    shape: str
    num_ranks: int
    num_processes: int
    tokens: int
    hidden: int
    topk: int
    experts: int
    dtype: str
    layout: str | None
    recv_capacity: int
    fill: str | None
    bytes: int
    sms: int | None
    cached: bool
    us: dict[str, float]
    timing: str
    wire_bytes: int
    floor_us: float
    extra_memory_bytes: int | None
    device: str
    versions: dict[str, str | None]
    commit: str | None
    dirty: bool | None
    command: str
    time: str
    run: str

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self))


@dataclass(frozen=True)
class Place:
    """Machine, software and command of a session."""

    device: str
    versions: dict[str, str | None]
    commit: str | None
    dirty: bool | None
    command: str
    time: str

    @classmethod
    def find(cls, commit: str | None = None) -> "Place":
        """The present one; `commit` names a tree of which the caller knows more than git here."""
        found, dirty = (commit, None) if commit else _find_commit()
        return cls(
            device=_name_device(),
            versions={
                "jax": jax.__version__,
                "jaxlib": version("jaxlib"),
                "driver": _run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
                "nccl": None,
            },
            commit=found,
            dirty=dirty,
            command=shlex.join(["python", "-m", "jax_ep", *sys.argv[1:]]),
            time=datetime.now(UTC).isoformat(timespec="seconds"),
        )

    def slug(self) -> str:
        """The device's name in a file name."""
        return re.sub(r"[^a-z0-9]+", "-", self.device.lower()).strip("-")


@dataclass(frozen=True)
class Measured:
    """The numbers of one contender at one point."""

    us: dict[str, float]
    bytes: int
    wire_bytes: int
    floor_us: float
    extra_memory_bytes: int | None


def make_record(
    op: str, point: Point, contender: Contender, measured: Measured, *, place: Place, run: str
) -> Record:
    """Joins all that is known about one measurement."""
    return Record(
        op=op,
        contender=contender.name,
        backend=contender.backend,
        algorithm=contender.algorithm,
        shape=point.shape,
        num_ranks=point.num_ranks,
        num_processes=jax.process_count(),
        tokens=point.num_tokens,
        hidden=point.hidden,
        topk=point.num_topk,
        experts=point.num_experts,
        dtype=point.dtype,
        layout=point.layout,
        recv_capacity=contender.recv_capacity,
        # Along a handle, all rows without a token are zero.
        fill="zeros" if op == "cached_dispatch" and contender.fill else contender.fill,
        sms=contender.sms,
        cached=op == "cached_dispatch",
        timing="chain",
        run=run,
        **asdict(measured),
        **asdict(place),
    )


def append_records(
    out: Path,
    name: str,
    records: Sequence[Mapping[str, Any]],
    shared: Mapping[str, Any],
    commit: str | None,
) -> None:
    """For scripts that measure something else than operations at points.

    Adds `records` to `<out>/<date>-<device>-<name>.jsonl`, each with `shared`, XLA's flags, and
    where and when it was measured; in process 0.
    """
    if jax.process_index() != 0:
        return
    place = Place.find(commit)
    path = out / f"{datetime.now(UTC):%Y-%m-%d}-{place.slug()}-{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = {
        **shared,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        **asdict(place),
        "command": shlex.join(["python", *sys.argv]),
    }
    with path.open("a") as file:
        file.writelines(json.dumps({**record, **beside}) + "\n" for record in records)
    print(f"{len(records)} records appended to {path}")


def _name_device() -> str:
    device = jax.devices()[0]
    if device.platform != "cpu":
        return str(device.device_kind)
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    name = found[1].strip() if found else platform.processor() or platform.machine()
    return f"{name} {len(os.sched_getaffinity(0))} cores"


def _find_commit() -> tuple[str | None, bool | None]:
    """Commit of the checkout that the package lies in, and whether files differ from it."""
    here = Path(__file__).resolve().parents[2]
    if not (here / ".git").exists():
        return None, None
    commit = _run("git", "-C", str(here), "rev-parse", "HEAD")
    if commit is None:
        return None, None
    # Results of earlier runs are no part of what is measured.
    paths = ("--", ":/", ":(top,exclude)benchmarks/results")
    return commit, bool(_run("git", "-C", str(here), "status", "--porcelain", *paths))


def _run(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    lines = done.stdout.strip().splitlines()
    return lines[0].strip() if lines else ""
