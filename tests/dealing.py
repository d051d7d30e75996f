"""Deals tests to several runs that together run all of them."""

import re
from collections import Counter
from collections.abc import Hashable, Sequence


def parse_share(text: str) -> tuple[int, int]:
    """Parses "0/2", the first of two runs, to (0, 2). Raises: ValueError."""
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    own, num_runs = map(int, found.groups()) if found else (0, 0)
    if own >= num_runs:
        raise ValueError(f"expected I/N, a run out of N that count from 0, got {text!r}")
    return own, num_runs


def deal(kinds: Sequence[Hashable], own: int, num_runs: int) -> list[bool]:
    """Tells which tests are in the run `own`, by the kinds of the tests.

    If a kind has at least two tests for each run, the runs take its tests in turns. Tests of other
    kinds, and tests whose kind is None, are in every run.
    """
    sizes, turns, chosen = Counter(kinds), Counter[Hashable](), []
    for kind in kinds:
        is_dealt = kind is not None and sizes[kind] >= 2 * num_runs
        chosen.append(not is_dealt or turns[kind] % num_runs == own)
        turns[kind] += 1
    return chosen
