"""Output of a command in the terminal: progress and a table."""

import sys
from collections.abc import Callable, Sequence
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
