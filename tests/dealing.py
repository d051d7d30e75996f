"""Deals tests to several runs that together run all of them."""

import re
import zlib
from collections.abc import Hashable, Sequence


def parse_share(text: str) -> tuple[int, int]:
    """Parses "0/2", the first of two runs, to (0, 2). Raises: ValueError."""
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    own, num_runs = map(int, found.groups()) if found else (0, 0)
    if own >= num_runs:
        raise ValueError(f"expected I/N, a run out of N that count from 0, got {text!r}")
    return own, num_runs


def deal(tests: Sequence[tuple[Hashable, str]], own: int, num_runs: int) -> list[bool]:
    """Tells which tests are in the run `own`, by their kinds and names.

    If a kind has at least a test for each run, the runs take its tests in turns, in an order that
    has nothing to do with their parameters. Tests of other kinds, and tests whose kind is None, are
    in every run.
    """
    members: dict[Hashable, list[int]] = {}
    for place, (kind, _) in enumerate(tests):
        members.setdefault(kind, []).append(place)
    chosen = [True] * len(tests)
    for kind, places in members.items():
        if kind is not None and len(places) >= num_runs:
            shuffled = sorted(places, key=lambda place: zlib.crc32(tests[place][1].encode()))
            for turn, place in enumerate(shuffled):
                chosen[place] = turn % num_runs == own
    return chosen
