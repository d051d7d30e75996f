"""dispatch: defaults, and forms of its arguments. The conformance suite checks its values."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_ep
from jax_ep import reference
from jax_ep.testing.cases import Case, make_data
from jax_ep.testing.compare import assert_close, assert_same_bits
from jax_ep.testing.ranks import on_ranks


def test_dispatch_without_weights_returns_none(groups, layout, backend):
    group = groups(2)
    data = make_data(Case(2, layout), "balanced")

    def fn(x, topk_idx):
        return jax_ep.dispatch(
            x, topk_idx, group=group, num_experts=8, layout=layout, recv_capacity=72,
            backend=backend,
        )  # fmt: skip

    out = on_ranks(fn, group.mesh)(data.x, data.topk_idx)
    assert out.weights is None
    plan = reference.make_plan(data.topk_idx, num_experts=8, layout=layout, recv_capacity=72)
    assert_same_bits(out.x, reference.dispatch(plan, np.asarray(data.x)), what="x")


def test_default_capacity_is_the_worst_case(groups):
    group = groups(3)
    case = Case(3, "rank")
    data = make_data(case, "all_to_one_rank")
    fn = on_ranks(
        lambda x, i: jax_ep.dispatch(x, i, group=group, num_experts=case.num_experts), group.mesh
    )
    out = fn(data.x, data.topk_idx)
    assert out.x.shape == (3, 3 * case.num_tokens, case.hidden)
    assert out.num_dropped.sum() == 0


def test_wide_ids_stay_invalid(groups, layout, backend):
    """int64 ids that do not fit into int32 stay invalid instead of wrapping around."""
    group = groups(2)
    ids = np.array([[[0, 2**32], [3, -1]], [[2**32 + 1, 1], [-(2**33), 2]]], np.int64)
    x = np.ones((2, 2, 8), np.float32)

    def fn(x, topk_idx):
        return jax_ep.dispatch(
            x, topk_idx, group=group, num_experts=4, layout=layout, recv_capacity=8,
            backend=backend,
        )  # fmt: skip

    def constant(x):
        return fn(x, np.full((2, 2), 2**32 + 1, np.int64))

    with jax.enable_x64(True):
        out = on_ranks(fn, group.mesh)(jnp.asarray(x), jnp.asarray(ids))
    assert np.asarray(out.num_invalid).tolist() == [[1], [2]]
    assert np.asarray(out.num_recv).tolist() == [[2], [2]]
    for leaf in jax.tree.leaves(out):
        assert leaf.dtype in (jnp.int32, jnp.float32)
    # A NumPy constant has 64 bits even without x64.
    assert np.asarray(on_ranks(constant, group.mesh)(x).num_invalid).tolist() == [[4], [4]]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_weights_travel_as_f32_and_get_gradients_of_their_dtype(groups, dtype):
    """Values equal those of the same weights in f32, in every argument that takes weights."""
    group = groups(2)
    case = Case(2, "expert")
    data = make_data(case, "masked")
    narrow = np.asarray(data.topk_weights).astype(dtype)

    def layer(x, topk_idx, weights):
        def through(weights):
            out = jax_ep.dispatch(
                x, topk_idx, weights, group=group, num_experts=case.num_experts, layout="expert",
                recv_capacity=72,
            )  # fmt: skip
            assert out.weights.dtype == jnp.float32
            back = partial(jax_ep.combine, out.x, out.handle)
            w = jax_ep.combine_weights(out.weights.astype(weights.dtype), out.handle)
            return back(weights=out.weights.astype(weights.dtype)) + back(weights=weights), w

        y, pull = jax.vjp(through, weights)
        return y, pull(jax.tree.map(jnp.ones_like, y))[0]

    run = on_ranks(layer, group.mesh)
    (y, w), gradient = run(data.x, data.topk_idx, narrow)
    (wide_y, wide_w), wide_gradient = run(data.x, data.topk_idx, narrow.astype(np.float32))
    assert gradient.dtype == dtype
    assert_same_bits(y, wide_y, what="y")
    assert_same_bits(w, wide_w, what="w")
    assert_close(gradient.astype(jnp.float32), wide_gradient, tolerance=2e-2)
