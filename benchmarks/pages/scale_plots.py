"""The plots of docs/scale.md."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import scale

from jax_ep.bench.plots import OURS_COLOR, RIVAL_COLOR, STOCK_COLOR, STYLE, TEXT_COLOR
from jax_ep.bench.predict import RANKS
from jax_ep.bench.published import group


def draw(images: Path) -> None:
    """Draws what is predicted for ours, and predictions beside published times."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9.4, 4.4), layout="constrained")
        for axes, tokens in zip(figure.subplots(1, 2), (4096, 128), strict=True):
            _draw_ours(axes, tokens)
        figure.suptitle("predictions for H200, 8 a node, one 400 Gb/s NIC a GPU", fontsize="medium")
        figure.savefig(images / "scale-ours.png")
        figure = Figure(figsize=(6.4, 5.6), layout="constrained")
        _draw_published(figure.subplots())
        figure.savefig(images / "scale-published.png")


def _curves(tokens: int) -> Iterator[tuple[str, str, str, list[float]]]:
    colors = (OURS_COLOR, RIVAL_COLOR, STOCK_COLOR)
    for (op, dtype), color in zip(scale.KINDS, colors, strict=True):
        for limit, line in ((None, "-"), (scale.LIMIT, "--")):
            times = [scale.predict(op, scale.at(n, tokens, dtype, limit)).us for n in RANKS]
            name = f"{op}, {dtype}" + ("" if limit is None else f", {limit} nodes a token")
            yield name, color, line, times


def _draw_ours(axes: Any, tokens: int) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    for name, color, line, times in _curves(tokens):
        axes.plot(RANKS, times, line, marker="o", markersize=4, color=color, label=name)
    axes.set(xscale="log", yscale="log", xlabel="ranks", ylabel="predicted microseconds")
    axes.set_title(f"{tokens:,} tokens of a rank", loc="left")
    axes.set_xticks(RANKS, [f"{n:,}" for n in RANKS])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.grid(visible=True)
    axes.legend(frameon=False, fontsize="x-small", loc="lower right")


def _draw_published(axes: Any) -> None:
    from matplotlib.ticker import FuncFormatter

    marks = {"throughput": "o", "low_latency": "^"}
    colors = {"NVLink": STOCK_COLOR, "cx7": OURS_COLOR, "efa": RIVAL_COLOR}
    for (level, color), (mode, mark) in (
        (level, mode) for level in colors.items() for mode in marks.items()
    ):
        own = [
            r
            for (_, n, m), g in group(scale.tested()).items()
            if (n, m) == (level, mode)
            for r in g
        ]
        axes.plot(
            [row.us for row in own],
            [row.predicted.us for row in own],
            mark,
            markersize=4.5,
            color=color,
            alpha=0.8,
            label=f"{scale.LEVELS[level]}, {scale.MODES[mode]} tokens",
        )
    ends = [5.0, 20_000.0]
    axes.plot(ends, ends, color=TEXT_COLOR, linewidth=1)
    axes.fill_between(
        ends,
        [end * (1 - scale.NEAR) for end in ends],
        [end * (1 + scale.NEAR) for end in ends],
        color=TEXT_COLOR,
        alpha=0.2,
        linewidth=0,
        label=f"within {scale.NEAR:.0%}",
    )
    axes.set(xscale="log", yscale="log", xlim=ends, ylim=ends)
    axes.set(xlabel="published microseconds", ylabel="predicted microseconds")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.grid(visible=True)
    axes.legend(frameon=False, fontsize="small", loc="upper left")
