"""Comparison of the parts of an array that this process can see, by value."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

Index = tuple[Any, ...]


def shards(x: Any) -> Iterator[tuple[Index, Any]]:
    """Yields (index into the whole array, values) of each addressable shard.

    A NumPy array is one shard. In a program of several processes, each process sees the shards of a
    jax.Array on its own devices.
    """
    if isinstance(x, jax.Array):
        for shard in x.addressable_shards:
            yield (*shard.index, ...), np.asarray(shard.data)
    else:
        yield (...,), np.asarray(x)


def assert_same_bits(
    got: Any, expected: Any, *, what: str = "arrays", where: Any = None, nan_bits: bool = False
) -> None:
    """Asserts equal shape, dtype and values in every addressable shard. +0 and -0 differ.

    Args:
      got: a NumPy array, or a jax.Array of which other processes may hold parts.
      expected: the whole array.
      what: name of the array in the message.
      where: bool, with the shape of expected or its leading axes; other elements may have any
        value.
      nan_bits: whether the bits of NaNs are compared; False: all NaNs are equal.

    Raises: AssertionError, with the place of the first difference.
    """
    expected = np.asarray(expected)
    _require_alike(got, expected, what)
    for index, values in shards(got):
        wanted = expected[index]
        same = values.view(_bits(values)) == wanted.view(_bits(wanted))
        if not nan_bits and values.dtype.kind not in "iub":
            same |= np.isnan(values.astype(np.float32)) & np.isnan(wanted.astype(np.float32))
        if where is not None:
            is_free = ~where[index[: where.ndim]]
            same |= is_free.reshape(is_free.shape + (1,) * (same.ndim - is_free.ndim))
        _require_all(same, values, wanted, index, what)


def assert_close(got: Any, expected: Any, *, tolerance: float, what: str = "arrays") -> None:
    """Asserts equal shape and dtype, and differences of at most tolerance * max(1, |largest|).

    Raises: AssertionError, with the place of the first difference.
    """
    expected = np.asarray(expected)
    _require_alike(got, expected, what)
    largest = np.max(np.abs(expected.astype(np.float64)), initial=1.0)
    for index, values in shards(got):
        wanted = expected[index]
        difference = np.abs(values.astype(np.float64) - wanted.astype(np.float64))
        _require_all(difference <= tolerance * largest, values, wanted, index, what)


def _require_alike(got: Any, expected: Any, what: str) -> None:
    if got.shape != expected.shape or got.dtype != expected.dtype:
        raise AssertionError(
            f"{what}: expected {expected.dtype}{expected.shape}, got {got.dtype}{got.shape}"
        )


def _require_all(same: Any, values: Any, wanted: Any, index: Index, what: str) -> None:
    if not np.all(same):
        place = tuple(int(i) for i in np.argwhere(~same)[0])
        starts = [getattr(s, "start", None) or 0 for s in index[: len(place)]]
        starts += [0] * (len(place) - len(starts))
        whole = tuple(i + start for i, start in zip(place, starts, strict=True))
        raise AssertionError(
            f"{what}: {np.sum(~same)} of {same.size} values differ, first at {whole}: "
            f"expected {wanted[place]!r}, got {values[place]!r}"
        )


def _bits(x: Any) -> str:
    return f"u{x.dtype.itemsize}"
