"""What a command shows in the terminal: progress and a table."""

import importlib
import sys
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, NamedTuple, Self

from jax_ep.bench.record import Record
from jax_ep.bench.timing import Timing


class Progress:
    """Steps done, on stderr: tqdm's bar where tqdm is installed, else one rewritten line."""

    def __init__(self, total: int):
        self._total, self._done, self._label = total, 0, ""
        try:
            tqdm = importlib.import_module("tqdm").tqdm
        except ImportError:
            self._bar: Any = None
        else:
            self._bar = tqdm(total=total, file=sys.stderr, unit="turn")

    def label(self, text: str) -> None:
        """Names what is being measured."""
        self._label = text
        if self._bar is not None:
            self._bar.set_description(text)
        else:
            self._show()

    def tick(self) -> None:
        """One step is done."""
        self._done += 1
        if self._bar is not None:
            self._bar.update()
        else:
            self._show()

    def _show(self) -> None:
        text = f"\r{self._label}: {self._done} of {self._total}"
        print(f"{text:<79}", end="", file=sys.stderr, flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        else:
            print(file=sys.stderr)


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
    "chain us": lambda r: f"{_median(r.timing.chain):.1f}",
    "empty us": lambda r: f"{_median(r.timing.empty):.1f}",
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


def _median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    return ordered[len(ordered) // 2]


def _mebibytes(size: int | None) -> str:
    return "-" if size is None else f"{size / 2**20:.2f}"
