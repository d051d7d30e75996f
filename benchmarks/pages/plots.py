"""The plots of the pages."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from exchanges import sweep
from records import H200, SUMS, load_rivals, of_tune

from jax_ep.bench.plots import Rival, plot_bytes, plot_tokens
from jax_ep.bench.record import Record


def _records(found: Iterable[dict[str, Any]]) -> list[Record]:
    names = Record.__dataclass_fields__
    return [Record(**{n: r.get(n, "") for n in names}) for r in found]


def _rival_exchanges() -> list[Rival]:
    marks, flash = [], "FlashInfer, two H200"
    for r in load_rivals()["few_tokens"]:
        if "FlashInfer" in r["name"]:
            for count, values in r["us"].items():
                for op, value in zip(("dispatch", "combine"), values, strict=True):
                    marks.append(
                        Rival("FlashInfer, two H200", op, "rank", "bf16", int(count), value)
                    )
    for r in load_rivals()["exchanges"]:
        if "FlashInfer" in r["name"]:
            for op in ("dispatch", "combine"):
                middle = sum(r[op]) / 2
                marks.append(Rival(flash, op, "rank", "bf16", 4096, middle))
        elif "expanded" in r["name"]:
            for op in ("dispatch", "combine"):
                marks.append(Rival("DeepEP V2.1, two H200", op, "expert", "bf16", 4096, r[op]))
    return marks


def _rival_sums() -> list[Rival]:
    sizes = {"KiB": 1024, "MiB": 1024**2}
    return [
        Rival(r["name"], r["op"], None, "bf16", int(s.split()[0]) * sizes[s.split()[1]], value)
        for r in load_rivals()["sums"]
        if "pull" not in r["name"] and r["name"] != "SGLang, push"
        for s, value in r["us"].items()
    ]


def draw(images: Path) -> None:
    """Draws all of them into a folder."""
    images.mkdir(exist_ok=True)
    tokens = [r for r in sweep() if r["contender"] != "ragged_all_to_all"]
    marks = [m for m in _rival_exchanges() if m.x >= 128]
    rank = [r for r in tokens if r["layout"] == "rank" and r["dtype"] == "bf16"]
    expert = [r for r in tokens if r["layout"] == "expert"]
    plot_tokens(_records(rank), images / "tokens-rank.png", marks)
    plot_tokens(_records(expert), images / "tokens-expert.png", marks)
    newest_sums = [r for r in of_tune(H200) if r["commit"] == "3cfd6c2"]
    for name, ops in (("bytes", (SUMS[0], SUMS[3])), ("bytes-halves", SUMS[1:3])):
        own = [r for r in newest_sums if r["op"] in ops]
        plot_bytes(_records(own), images / f"{name}.png", _rival_sums())
