"""Writes the tables and plots of the pages from the records; no number is typed by hand.

    python benchmarks/pages            # tables: README.md, docs/, benchmarks/
    python benchmarks/pages --plots    # and docs/images/*.png; needs matplotlib
    python benchmarks/pages --check    # changes nothing, fails where a table is not up to date

A page says `<!-- records: NAME -->` where table NAME begins and `<!-- end -->` where it ends.
"""

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path

import exchanges
import few
import plots
import ragged_exchanges
import rivals
import scale
import scale_plots
import single_steps
import sums

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "docs/performance.md", "docs/scale.md", "benchmarks/NOTES.md")
_BLOCK = re.compile(r"(<!-- records: (\S+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)

TABLES: dict[str, Callable[[str], str]] = {
    "first-screen": rivals.first_screen,
    "beside-stock": exchanges.beside_stock,
    "budgets": exchanges.budgets,
    "mixtral": exchanges.mixtral,
    "few-tokens": few.few_tokens,
    "few-tokens-late": few.late_rank,
    "single-steps": single_steps.single_steps,
    "late-rank": single_steps.a_late_rank,
    "over-tokens": exchanges.over_tokens,
    "four-gpus": exchanges.four_gpus,
    "processes": exchanges.processes,
    "overlap": exchanges.overlap,
    "host-time": exchanges.host_time,
    "sums": sums.sums,
    "sums-of-h100": sums.sums_of_h100,
    "decode-layer": sums.decode_layer,
    "ragged": ragged_exchanges.ragged,
    "cpus": exchanges.cpus,
    "rivals": rivals.rivals,
    "scale-constants": scale.constants,
    "scale-held-out": scale.held_out,
    "scale-rivals": scale.rivals,
    "scale-errors": scale.errors,
    "scale-ours": scale.ours,
    "scale-groups": scale.groups,
}


def fill(page: str, text: str) -> str:
    """The text of a page, with its tables as the records have them."""
    return _BLOCK.sub(lambda m: f"{m[1]}\n{TABLES[m[2]](page)}\n{m[4]}", text)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--plots", action="store_true", help="draw docs/images/*.png as well")
    parser.add_argument("--check", action="store_true", help="change nothing; fail where it would")
    flags = parser.parse_args()
    stale = 0
    for page in PAGES:
        path = ROOT / page
        text = path.read_text()
        filled = fill(page, text)
        if filled != text:
            stale += 1
            print(f"{page} {'is not up to date' if flags.check else 'written'}")
            if not flags.check:
                path.write_text(filled)
    if flags.plots:
        draw_into = ROOT / "docs" / "images"
        draw_into.mkdir(exist_ok=True)
        plots.draw(draw_into)
        scale_plots.draw(draw_into)
    return stale if flags.check else 0


if __name__ == "__main__":
    sys.exit(main())
