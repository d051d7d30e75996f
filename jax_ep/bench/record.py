"""One line of a result file: a contender at a point, and where and when it was measured."""

import ctypes
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
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jax_ep.bench.steps import Steps
from jax_ep.testing.cases import DTYPES


@dataclass(frozen=True)
class Subject:
    """A contender at a point.

    [tokens, hidden] is a rank's x; of reduce_scatter, each of the parts of x. `sms` is the budget
    where a call takes one; of a round trip that was told none, the larger of its two. `max_nodes`
    is that of the shape: fewer nodes than the group has mean group-limited routing. What an
    operation does not have is None.
    """

    op: str
    contender: str
    backend: str
    algorithm: str | None
    shape: str
    num_ranks: int
    tokens: int
    hidden: int
    topk: int | None
    experts: int | None
    ranks_per_node: int | None
    max_nodes: int | None
    dtype: str
    layout: str | None
    recv_capacity: int | None
    fill: str | None
    sms: int | None
    cached: bool

    @property
    def num_bytes(self) -> int:
        """Bytes of that array; not for fp8, which has scales as well."""
        return self.tokens * self.hidden * jnp.dtype(DTYPES[self.dtype]).itemsize


@dataclass(frozen=True)
class Measured:
    """The numbers of one contender at one point.

    `us` is per operation, on the slowest rank, after subtraction of the empty chain. The bytes are
    those of one rank, the busiest one; `bytes` is what it reads and what it writes, together.
    `steps` are times of single steps, where these were measured.
    """

    us: dict[str, float]
    timing: str
    bytes: int
    wire_bytes: int
    floor_us: float
    extra_memory_bytes: int | None
    steps: Steps | None


@dataclass(frozen=True)
class Place:
    """Machine, software and command of a session.

    `dirty` says whether files differ from `commit`. It is None where nobody knows: there is no
    checkout, or the commit was named by --commit, and whether the tree was clean was not.
    """

    num_processes: int
    device: str
    versions: dict[str, str | None]
    xla_flags: str
    commit: str | None
    dirty: bool | None
    command: str
    time: str


@dataclass(frozen=True)
class Record(Place, Measured, Subject):
    """All of it; contenders that took turns share `run`."""

    run: str

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self))


def make_record(subject: Subject, measured: Measured, place: Place, run: str) -> Record:
    """Joins all that is known about one measurement."""
    return Record(run=run, **vars(subject), **vars(measured), **vars(place))


def brief_record(
    op: str, contender: str, backend: str, us: Mapping[str, float], run: str, **facts: Any
) -> dict[str, Any]:
    """For scripts that measure something else than operations at points: `facts` in their place.

    `facts` may name another `timing`. The rest is what a Record has, once `append_brief_records`
    has added the place.
    """
    return {
        "op": op,
        "contender": contender,
        "backend": backend,
        "us": dict(us),
        "timing": "chain",
        **facts,
        "run": run,
    }


def append_brief_records(
    out: Path, name: str, records: Sequence[Mapping[str, Any]], commit: str | None
) -> None:
    """Adds them to the file of this day, device and name; in process 0."""
    place = find_place(commit)
    if jax.process_index() == 0:
        lines = [json.dumps({**record, **asdict(place)}) for record in records]
        append_lines(result_path(out, place, name), lines)


def result_path(out: Path, place: Place, name: str) -> Path:
    """Returns the path of this day's records."""
    device = re.sub(r"[^a-z0-9]+", "-", place.device.lower()).strip("-")
    return out / f"{datetime.now(UTC):%Y-%m-%d}-{device}-{name}.jsonl"


def append_lines(path: Path, lines: Sequence[str]) -> None:
    """To a file that there may be already."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(line + "\n" for line in lines)
    print(f"{len(lines)} records appended to {path}")


def find_place(commit: str | None = None) -> Place:
    """The present one; `commit` names a tree of which the caller knows more than git here."""
    found, dirty = (commit, None) if commit else _find_commit()
    return Place(
        num_processes=jax.process_count(),
        device=_name_device(),
        versions={
            "jax": jax.__version__,
            "jaxlib": version("jaxlib"),
            "driver": _run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
            "nccl": _find_nccl(),
        },
        xla_flags=os.environ.get("XLA_FLAGS", ""),
        commit=found,
        dirty=dirty,
        command=_name_command(),
        time=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _name_command() -> str:
    is_module = Path(sys.argv[0]).name == "__main__.py"
    program = ["-m", "jax_ep"] if is_module else sys.argv[:1]
    return shlex.join(["python", *program, *sys.argv[1:]])


def _find_nccl() -> str | None:
    """The version of the NCCL that this process has loaded, else of the wheel that XLA loads."""
    try:
        # NOLOAD: to load another one than XLA's would do harm.
        library = ctypes.CDLL("libnccl.so.2", mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
        code = ctypes.c_int()
        library.ncclGetVersion(ctypes.byref(code))
    except (OSError, AttributeError):
        return _version_of_wheel("nvidia-nccl-cu13") or _version_of_wheel("nvidia-nccl-cu12")
    return f"{code.value // 10000}.{code.value // 100 % 100}.{code.value % 100}"


def _version_of_wheel(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


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
