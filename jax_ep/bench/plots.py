"""Plots of records: microseconds over tokens, and over bytes. They need matplotlib.

One panel for each operation, layout and dtype, with three lines: jax_ep at its fastest, stock JAX
at its fastest, and the floor. The background is transparent and the colours are of middle
lightness, so a plot can be read on a white page and on a dark one.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jax_ep.bench.record import Record

OURS_COLOR, STOCK_COLOR, FLOOR_COLOR, RIVAL_COLOR = "#1395ba", "#e07b28", "#8b949e", "#a463f2"
TEXT_COLOR = "#7d8590"
STYLE: Any = {
    "text.color": TEXT_COLOR,
    "axes.labelcolor": TEXT_COLOR,
    "axes.edgecolor": TEXT_COLOR,
    "xtick.color": TEXT_COLOR,
    "ytick.color": TEXT_COLOR,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": "large",
    "axes.titleweight": "bold",
    "grid.alpha": 0.25,
    "font.size": 11.0,
    "savefig.transparent": True,
    "savefig.dpi": 160.0,
}
_MAX_COLUMNS = 3


class Rival(NamedTuple):
    """Time of another library, at one place of a plot.

    Attributes:
      name: what the plot calls it.
      op: the operation of ours that it is compared with.
      layout, dtype: of a panel.
      x: tokens or bytes.
      us: microseconds.
    """

    name: str
    op: str
    layout: str | None
    dtype: str
    x: int
    us: float


def plot_tokens(records: Sequence[Record], path: Path, rivals: Iterable[Rival] = ()) -> None:
    """Dispatches, combines and round trips over the tokens of a rank."""
    _plot(records, path, rivals, _Axis(lambda r: r.tokens, "tokens of a rank", "{:,}".format))


def plot_bytes(records: Sequence[Record], path: Path, rivals: Iterable[Rival] = ()) -> None:
    """The all_reduce family over the bytes of a rank."""
    _plot(records, path, rivals, _Axis(lambda r: r.num_bytes, "bytes of a rank", format_bytes))


def format_bytes(size: float) -> str:
    """In the largest unit that leaves at least one."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:g} {unit}"
        size /= 1024
    return f"{size:g} GiB"


class _Axis(NamedTuple):
    x_of: Callable[[Record], int]
    label: str
    format: Callable[[float], str]


def _plot(records: Sequence[Record], path: Path, rivals: Iterable[Rival], axis: _Axis) -> None:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    rivals = list(rivals)
    panels: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        panels.setdefault((record.op, record.layout, record.dtype), []).append(record)
    columns = min(len(panels), _MAX_COLUMNS)
    rows = -(-len(panels) // columns)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(0.6 + 4.4 * columns, 0.5 + 3.9 * rows), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False)
        for i, (panel, own) in enumerate(panels.items()):
            axes = grid.flat[i]
            _draw(axes, own, [r for r in rivals if (r.op, r.layout, r.dtype) == panel], axis)
            op, layout, dtype = panel
            axes.set_title(op if layout is None else f"{op}, {layout} layout, {dtype}", loc="left")
        for axes in grid.flat[len(panels) :]:
            axes.set_visible(False)
        devices = dict.fromkeys(f"{r.num_ranks} x {r.device}" for r in records)
        figure.suptitle(", ".join(devices), fontsize="medium")
        figure.savefig(path)


def _draw(axes: Any, records: Sequence[Record], rivals: Sequence[Rival], axis: _Axis) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    ours, stock = _ours(records), [r for r in records if r.contender != "jax_ep"]
    lows = []
    for line, color, name in ((ours, OURS_COLOR, "jax_ep"), (stock, STOCK_COLOR, "stock JAX")):
        if line:
            points, who = _fastest(line, axis)
            axes.plot(*zip(*points, strict=True), "o-", color=color, label=f"{name} ({who})")
            lows += [us for _, us in points]
    floor = sorted({(axis.x_of(r), r.floor_us) for r in records})
    style = {"color": FLOOR_COLOR, "linestyle": "--", "marker": "" if len(floor) > 1 else "_"}
    axes.plot(*zip(*floor, strict=True), label="floor", **style)
    markers = dict(zip(dict.fromkeys(r.name for r in rivals), "D^sv", strict=False))
    for name, marker in markers.items():
        points = sorted((r.x, r.us) for r in rivals if r.name == name)
        style = {"color": RIVAL_COLOR, "marker": marker, "linestyle": "", "label": name}
        axes.plot(*zip(*points, strict=True), **style)
        lows += [us for _, us in points]
    axes.set(xscale="log", yscale="log", xlabel=axis.label, ylabel="microseconds (median)")
    # A floor of nanoseconds would leave the lines no room.
    axes.set_ylim(bottom=max(min(us for _, us in floor), min(lows) / 2) * 0.8)
    places = sorted({axis.x_of(r) for r in records})
    named = _apart(places)
    axes.set_xticks(places, [axis.format(x) if x in named else "" for x in places])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda us, _: f"{us:,g}"))
    axes.grid(visible=True)
    axes.legend(frameon=False, fontsize="small", loc="upper left")


def _apart(places: Sequence[int]) -> set[int]:
    """Returns the places whose labels do not run into one another; the last place is among them."""
    named = set(places[-1:])
    for x in reversed(places):
        if (min(named) / x) > (places[-1] / places[0]) ** 0.17:
            named.add(x)
    return named


def _ours(records: Sequence[Record]) -> list[Record]:
    """Returns the records of the custom calls, or else of the back end `xla`."""
    ours = [r for r in records if r.contender == "jax_ep"]
    return [r for r in ours if r.backend != "xla"] or ours


def _fastest(records: Sequence[Record], axis: _Axis) -> tuple[list[tuple[int, float]], str]:
    """(x, microseconds) of the fastest record at each x, and who they are."""
    best: dict[int, Record] = {}
    for record in sorted(records, key=lambda r: (axis.x_of(r), r.us["p50"])):
        best.setdefault(axis.x_of(record), record)
    names = (
        r.backend if r.contender == "jax_ep" else r.algorithm or r.contender for r in best.values()
    )
    return [(x, r.us["p50"]) for x, r in best.items()], ", ".join(dict.fromkeys(names))
