"""Output of a command in the terminal: progress and a table."""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jax_ep._src.base.errors import ConfigError
from jax_ep.bench.record import Record
from jax_ep.bench.timing import Timing


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
    "step p50": lambda r: _of_steps(r, "p50"),
    "step p90": lambda r: _of_steps(r, "p90"),
    "step p99": lambda r: _of_steps(r, "p99"),
    "floor us": lambda r: f"{r.record.floor_us:.2f}",
    "x floor": lambda r: f"{r.record.us['p50'] / r.record.floor_us:.2f}",
    "wire GB/s": lambda r: f"{r.record.wire_bytes / r.record.us['p50'] / 1e3:.0f}",
    "extra MiB": lambda r: _mebibytes(r.record.extra_memory_bytes),
    "count": lambda r: str(r.timing.count),
}
_LATE_COLUMNS: dict[str, Callable[[Row], str]] = {
    **{name: _COLUMNS[name] for name in list(_COLUMNS)[: list(_COLUMNS).index("chain us")]},
    "step p50": _COLUMNS["step p50"],
    "late by us": lambda r: f"{_late(r)[0]}",
    "others p50": lambda r: f"{_late(r)[1]['p50']:.1f}",
    "p90": lambda r: f"{_late(r)[1]['p90']:.1f}",
    "p99": lambda r: f"{_late(r)[1]['p99']:.1f}",
    "p50 - delay": lambda r: f"{_late(r)[1]['p50'] - _late(r)[0]:.1f}",
}
_TEXT_COLUMNS = ("op", "shape", "layout", "contender", "algorithm")


def format_table(rows: Sequence[Row]) -> str:
    """Aligned text, without empty columns. `us` is `chain us` - `empty us`, repeat by repeat."""
    return _format(_COLUMNS, rows)


def format_late_table(rows: Sequence[Row]) -> str:
    """How long the other ranks' operation takes while one rank is late; empty if none was."""
    late = [row for row in rows if row.record.steps and row.record.steps.delayed_us]
    return _format(_LATE_COLUMNS, late) if late else ""


def format_clock(rows: Sequence[Row]) -> str:
    """What is known about the clocks that timed the single steps; empty if none did."""
    known = [row.record.steps for row in rows if row.record.steps]
    if not known:
        return ""
    reading = float(np.median([steps.clock_us for steps in known]))
    spans = max(steps.span for steps in known)
    means = f", means of {spans} in a row" if spans > 1 else ""
    return (
        f"steps: at least {min(steps.count for steps in known)} of each rank{means}; a reading "
        f"takes {reading:.2f} us, which is subtracted; the clocks' tick is "
        f"{max(steps.tick_ns for steps in known)} ns"
    )


def _format(columns: Mapping[str, Callable[[Row], str]], rows: Sequence[Row]) -> str:
    lines = []
    for name, cell in columns.items():
        cells = [cell(row) for row in rows]
        if any(cells):
            width = max(map(len, (name, *cells)))
            pad = str.ljust if name in _TEXT_COLUMNS else str.rjust
            lines.append([pad(text, width) for text in (name, *cells)])
    return "\n".join("  ".join(line).rstrip() for line in zip(*lines, strict=True))


def _of_steps(row: Row, percentile: str) -> str:
    steps = row.record.steps
    return f"{steps.us[percentile]:.1f}" if steps else ""


def _late(row: Row) -> tuple[int, dict[str, float]]:
    """By how much a rank was late, and the other ranks' steps."""
    steps = row.record.steps
    assert steps is not None
    assert steps.delay_us is not None
    assert steps.delayed_us is not None
    return steps.delay_us, steps.delayed_us


def _mebibytes(size: int | None) -> str:
    return "-" if size is None else f"{size / 2**20:.2f}"
