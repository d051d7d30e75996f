"""What is shown: progress, a table, a plot."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jax_ep.bench.record import Record
from jax_ep.bench.timing import Timing
from jax_ep.errors import ConfigError


def progress(total: int) -> Any:
    """A bar of tqdm's on stderr, of `total` steps; a context manager.

    Raises: ConfigError when tqdm is not installed.
    """
    try:
        from tqdm import tqdm
    except ImportError as e:
        raise ConfigError("bench: needs tqdm: pip install 'jax_ep[bench]'") from e
    return tqdm(total=total, file=sys.stderr, unit="turn")


class Row(NamedTuple):
    """One line of the table."""

    record: Record
    timing: Timing


_COLUMNS: dict[str, Callable[[Row], str]] = {
    "op": lambda r: r.record.op,
    "shape": lambda r: r.record.shape,
    "tokens": lambda r: str(r.record.tokens),
    "layout": lambda r: r.record.layout or "",
    "contender": lambda r: f"{r.record.contender} {r.record.backend}",
    "algorithm": lambda r: r.record.algorithm or "",
    "sms": lambda r: "" if r.record.sms is None else str(r.record.sms),
    "chain us": lambda r: f"{np.median(r.timing.chain):.1f}",
    "empty us": lambda r: f"{np.median(r.timing.empty):.1f}",
    "us p50": lambda r: f"{r.record.us['p50']:.1f}",
    "p10": lambda r: f"{r.record.us['p10']:.1f}",
    "p90": lambda r: f"{r.record.us['p90']:.1f}",
    "p99": lambda r: f"{r.record.us['p99']:.1f}",
    "floor us": lambda r: f"{r.record.floor_us:.2f}",
    "x floor": lambda r: f"{r.record.us['p50'] / r.record.floor_us:.2f}",
    "wire GB/s": lambda r: f"{r.record.wire_bytes / r.record.us['p50'] / 1e3:.0f}",
    "extra MiB": lambda r: _mebibytes(r.record.extra_memory_bytes),
    "count": lambda r: str(r.timing.count),
}
_TEXT_COLUMNS = ("op", "shape", "layout", "contender", "algorithm")


def format_table(rows: Sequence[Row]) -> str:
    """Aligned text, without empty columns. `us` is `chain us` - `empty us`, repeat by repeat."""
    columns = []
    for name, cell in _COLUMNS.items():
        cells = [cell(row) for row in rows]
        if any(cells):
            width = max(map(len, (name, *cells)))
            pad = str.ljust if name in _TEXT_COLUMNS else str.rjust
            columns.append([pad(text, width) for text in (name, *cells)])
    return "\n".join("  ".join(line).rstrip() for line in zip(*columns, strict=True))


def _mebibytes(size: int | None) -> str:
    return "-" if size is None else f"{size / 2**20:.2f}"


def plot(records: Sequence[Record], path: Path) -> None:
    """Median over floor of every contender, one group of bars for each point. Needs matplotlib."""
    from matplotlib.figure import Figure

    points = list(dict.fromkeys(_point_label(r) for r in records))
    names = list(dict.fromkeys(map(_contender_label, records)))
    figure = Figure(figsize=(max(6.0, 2.0 * len(points)), 4.0), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        own = [r for r in records if _contender_label(r) == name]
        places = [points.index(_point_label(r)) + (i + 0.5) * width - 0.4 for r in own]
        axes.bar(places, [r.us["p50"] / r.floor_us for r in own], width, label=name)
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(points)), points, fontsize="small")
    axes.set_yscale("log")
    axes.set_ylabel("time over floor (p50)")
    axes.set_title(records[0].device, fontsize="medium")
    axes.legend()
    figure.savefig(path)


def plot_sizes(records: Sequence[Record], path: Path) -> None:
    """Time over bytes of all_reduce and its relatives, one panel for each. Needs matplotlib."""
    from matplotlib.figure import Figure

    ops = list(dict.fromkeys(r.op for r in records))
    names = list(dict.fromkeys(map(_way_label, records)))
    figure = Figure(figsize=(4.0 * len(ops), 4.0), layout="constrained")
    panels = figure.subplots(1, len(ops), sharey=True, squeeze=False)[0]
    for axes, op in zip(panels, ops, strict=True):
        own = [r for r in records if r.op == op]
        for color, name in enumerate(names):
            line = sorted((r.num_bytes, r.us["p50"]) for r in own if _way_label(r) == name)
            if line:
                axes.plot(*zip(*line, strict=True), f"C{color}.-", label=name)
        floor = sorted({(r.num_bytes, r.floor_us) for r in own})
        axes.plot(*zip(*floor, strict=True), color="black", linewidth=0.8, label="floor")
        axes.set(xscale="log", yscale="log", xlabel="bytes of a rank", title=op)
        axes.legend(fontsize="small")
    panels[0].set_ylabel("microseconds (p50)")
    title = f"{records[0].device}, {records[0].num_ranks} ranks"
    figure.suptitle(title, fontsize="medium")
    figure.savefig(path)


def _way_label(record: Record) -> str:
    if record.contender != "jax_ep":
        return "stock by NCCL" if record.algorithm == "nccl" else "stock"
    return f"{record.algorithm} {record.backend}"


def _contender_label(record: Record) -> str:
    budget = "" if record.sms is None else f", {record.sms} SMs"
    return f"{record.contender} {record.backend}{budget}"


def _point_label(record: Record) -> str:
    return f"{record.op}\n{record.shape}, {record.tokens} tokens\n{record.layout} layout"
