"""combine against the reference, to the bit."""

import jax.numpy as jnp
import numpy as np
import pytest
from cases import Case, assert_combined, make_data, plan_of, run

import jax_ep
from jax_ep.testing.compare import assert_same_bits
from jax_ep.testing.ranks import on_ranks

DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.__name__)
@pytest.mark.parametrize("weights_at", [None, "rows", "tokens"])
@pytest.mark.parametrize("num_biases", [0, 1, 2])
def test_weights_and_biases(groups, backend, dtype, weights_at, num_biases):
    case = Case(3, "expert", dtype=dtype, weights_at=weights_at, num_biases=num_biases, num_topk=4)
    data = make_data(case, "balanced")
    _, y = run(case, groups(3), backend, data)
    assert_combined(case, data, plan_of(case, data), y)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.__name__)
def test_rank_layout_biases(groups, backend, dtype):
    case = Case(8, "rank", dtype=dtype, num_biases=2, num_topk=8)
    data = make_data(case, "balanced")
    _, y = run(case, groups(8), backend, data)
    assert_combined(case, data, plan_of(case, data), y)


def test_large_hidden_is_not_contracted(groups, backend):
    """Enough products to show a contracted multiply-add, in f32, where it would be visible."""
    case = Case(4, "expert", dtype=jnp.float32, weights_at="rows", hidden=4096, num_topk=8)
    data = make_data(case, "balanced")
    _, y = run(case, groups(4), backend, data)
    assert_combined(case, data, plan_of(case, data), y)


def test_nan_and_inf_reach_their_token_only(groups, layout, backend):
    case = Case(4, layout, dtype=jnp.float32, weights_at=None)
    data = make_data(case, "balanced")
    data.rows[1, 0] = np.nan
    data.rows[2, 1] = np.inf
    _, y = run(case, groups(4), backend, data)
    assert_combined(case, data, plan_of(case, data), y)
    assert np.isnan(np.asarray(y)).any()
    assert np.isinf(np.asarray(y)).any()


def test_garbage_in_unused_rows_does_not_leak(groups, layout, backend):
    case = Case(4, layout, dtype=jnp.float32, weights_at=None if layout == "rank" else "tokens")
    data = make_data(case, "masked")
    data.rows[plan_of(case, data).recv_src < 0] = np.nan
    _, y = run(case, groups(4), backend, data)
    assert not np.isnan(np.asarray(y)).any()
    assert_combined(case, data, plan_of(case, data), y)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.__name__)
def test_subnormals_are_kept(groups, layout, dtype):
    """By the host twins; XLA:CPU itself flushes subnormals, so its back end cannot keep them."""
    case = Case(2, layout, dtype=dtype)
    data = make_data(case, "balanced")
    tiny = float(jnp.finfo(dtype).tiny) / 4
    data.rows[:] = (np.asarray(data.rows, np.float32) * tiny).astype(dtype)
    _, y = run(case, groups(2), "cpu", data)
    assert_combined(case, data, plan_of(case, data), y)
    assert np.any(np.asarray(y, np.float32) != 0)


def test_handles_are_valid_across_back_ends(groups, layout):
    """What one back end dispatched, the other combines."""
    group = groups(4)
    case = Case(4, layout)
    data = make_data(case, "skewed")

    def fn(x, topk_idx, rows):
        ys = {}
        for there, back in (("cpu", "xla"), ("xla", "cpu")):
            out = jax_ep.dispatch(
                x, topk_idx, group=group, num_experts=case.num_experts, layout=layout,
                recv_capacity=case.capacity, backend=there,
            )  # fmt: skip
            ys[there] = jax_ep.combine(rows, out.handle, backend=back)
        return ys

    ys = on_ranks(fn, group.mesh)(data.x, data.topk_idx, data.rows)
    for y in ys.values():
        assert_combined(case, data, plan_of(case, data), y)
    assert_same_bits(ys["cpu"], ys["xla"])
