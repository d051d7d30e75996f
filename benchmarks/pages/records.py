"""Records, and how they become cells and tables of Markdown."""

import json
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jax_ep.bench.plots import format_bytes

HERE = Path(__file__).parents[1]
H100, H200 = "NVIDIA H100 80GB HBM3", "NVIDIA H200"
EXCHANGES = ("dispatch", "cached_dispatch", "combine")
SUMS = ("all_reduce", "reduce_scatter", "all_gather", "all_reduce_residual_rmsnorm")
Row = Sequence[str]


@cache
def load() -> list[dict[str, Any]]:
    """All records, the oldest first."""
    paths = sorted((HERE / "results").glob("*.jsonl"))
    records = [
        {**json.loads(line), "file": path.name}
        for path in paths
        for line in path.read_text().splitlines()
    ]
    return sorted(records, key=lambda r: r["time"])


@cache
def load_rivals() -> dict[str, Any]:
    """Times of other libraries."""
    rivals: dict[str, Any] = json.loads((HERE / "rivals.json").read_text())
    return rivals


def pick(**wanted: Any) -> list[dict[str, Any]]:
    """The records whose fields are these, the oldest first; of a commit, its first digits."""

    def matches(record: dict[str, Any]) -> bool:
        return all(
            str(record["commit"]).startswith(value) if key == "commit" else record.get(key) == value
            for key, value in wanted.items()
        )

    return [record for record in load() if matches(record)]


def newest(**wanted: Any) -> dict[str, Any]:
    """The last of them."""
    found = pick(**wanted)
    if not found:
        raise LookupError(f"no record with {wanted}")
    return found[-1]


def us(value: float | Sequence[float] | None) -> str:
    """Microseconds as a cell: three digits, or an empty one."""
    if value is None:
        return ""
    if isinstance(value, Sequence):
        return " to ".join(us(v) for v in value)
    if value >= 100 or isinstance(value, int):
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 1 else f"{value:.2g}"


def times(record: dict[str, Any]) -> dict[str, float]:
    """Percentiles of single steps where a record has them, else those of its chains."""
    found: dict[str, float] = (record.get("steps") or record)["us"]
    return found


def median(record: dict[str, Any]) -> str:
    """Median of a record, as a cell."""
    return us(record["us"]["p50"])


def cell(**wanted: Any) -> str:
    """The median of the newest record, or nothing where there is no record."""
    found = pick(**wanted)
    return median(found[-1]) if found else ""


def table(head: Row, rows: Iterable[Row]) -> str:
    """As Markdown; the first column holds text, the others numbers."""
    align = ["---", *["--:"] * (len(head) - 1)]
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, align, *rows))


def files(records: Iterable[dict[str, Any]], page: str) -> str:
    """Links to the files of records, with their commits."""
    commits: dict[str, list[str]] = {}
    for record in records:
        known = commits.setdefault(record["file"], [])
        if record["commit"][:7] not in known:
            known.append(record["commit"][:7])
    up = "../" * page.count("/") if not page.startswith("benchmarks/") else ""
    folder = "results" if page.startswith("benchmarks/") else f"{up}benchmarks/results"
    links = [f"[{', '.join(known)}]({folder}/{name})" for name, known in commits.items()]
    return "; ".join(links)


def source(records: Sequence[dict[str, Any]], page: str) -> str:
    """The line below a table: machine, software, commits, files."""
    places = dict.fromkeys(
        f"{r['num_ranks']} {'GPUs' if r['versions']['driver'] else 'devices'} of {r['device']}"
        for r in records
    )
    software = [f"JAX {v}" for v in dict.fromkeys(r["versions"]["jax"] for r in records)]
    software += [
        f"driver {v}" for v in dict.fromkeys(r["versions"]["driver"] for r in records) if v
    ]
    where = "; ".join(places)
    return f"\n*{where}. {', '.join(software)}. Records of {files(records, page)}.*\n"


def of_tune(device: str) -> list[dict[str, Any]]:
    """The records of all four operations, which `tune` has measured."""
    return [r for r in pick(device=device) if r["file"].endswith(f"-{'-'.join(SUMS)}.jsonl")]


def short_size(shape: str) -> str:
    """The name of a size: "1024 KiB" is "1 MiB"."""
    return format_bytes(1024 * float(shape.removesuffix(" KiB")))
