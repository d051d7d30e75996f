"""Comparison by value, to the bit."""

from typing import Any

import numpy as np


def assert_same_bits(got: Any, expected: Any, *, what: str = "arrays") -> None:
    """Equal shape, dtype and values. Zeros differ in their sign; any NaN equals any other."""
    got, expected = np.asarray(got), np.asarray(expected)
    if got.shape != expected.shape or got.dtype != expected.dtype:
        raise AssertionError(
            f"{what}: expected {expected.dtype}{expected.shape}, got {got.dtype}{got.shape}"
        )
    same = got.view(_bits(got)) == expected.view(_bits(expected))
    if got.dtype.kind not in "iub":
        same |= np.isnan(got.astype(np.float32)) & np.isnan(expected.astype(np.float32))
    if not same.all():
        place = tuple(int(i) for i in np.argwhere(~same)[0])
        raise AssertionError(
            f"{what}: {np.sum(~same)} of {same.size} values differ, first at {place}: "
            f"expected {expected[place]!r}, got {got[place]!r}"
        )


def _bits(x: Any) -> str:
    return f"u{x.dtype.itemsize}"
