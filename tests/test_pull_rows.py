"""pull_rows: single rows of the peers' arrays, of every dtype, in and out of range."""

from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest

from jax_ep._src.base.spec import CallSpec
from jax_ep._src.ops.pull_rows.call import pull_rows
from jax_ep.testing.compare import assert_same_bits
from jax_ep.testing.ranks import on_ranks


@pytest.mark.parametrize("dtype", ["u1", "i4", "f4", jnp.bfloat16, jnp.float8_e5m2, "?"], ids=str)
@pytest.mark.parametrize("width", [1, 3, 40])
def test_rows_of_every_dtype_are_pulled(groups, backend, dtype, width):
    group = groups(4)
    rng = np.random.default_rng(0)
    dtype = np.dtype(dtype)
    rows = rng.integers(
        0, 2 if dtype.kind == "b" else 256, (4, 6, width * dtype.itemsize), np.uint8
    )
    rows = rows.view(dtype)
    index = rng.integers(-1, 4 * 6, (4, 11)).astype(np.int32)
    pull = partial(pull_rows, CallSpec(group.spec, backend, 1, "dispatch"))
    got = on_ranks(pull, group.mesh)(index, rows)
    bits = f"u{dtype.itemsize}"
    flat = rows.view(bits).reshape(24, width)
    expected = np.where(index[..., None] >= 0, flat[np.maximum(index, 0)], 0).astype(bits)
    assert_same_bits(np.asarray(got).view(bits), expected)


def test_indices_out_of_range_give_zeros(groups):
    """The host implementation reads nothing outside the arrays, even for an altered handle."""
    group = groups(2)
    rows = np.ones((2, 3, 4), np.float32)
    index = np.array([[-2, 6, 2**31 - 1, -(2**31), 5]] * 2, np.int32)
    pull = partial(pull_rows, CallSpec(group.spec, "cpu", 1, "dispatch"))
    got = on_ranks(pull, group.mesh)(index, rows)
    assert_same_bits(got, np.array([[[0] * 4] * 4 + [[1] * 4]] * 2, np.float32))
