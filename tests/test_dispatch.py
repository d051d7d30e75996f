"""dispatch: defaults, and forms of its arguments. Its values are in the conformance suite."""

import jax
import jax.numpy as jnp
import numpy as np

import jax_ep
from jax_ep import reference
from jax_ep.testing.cases import Case, make_data
from jax_ep.testing.compare import assert_same_bits
from jax_ep.testing.ranks import on_ranks


def test_without_weights(groups, layout, backend):
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


def test_wide_ids(groups, layout, backend):
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
    # A NumPy constant is wide without x64, too.
    assert np.asarray(on_ranks(constant, group.mesh)(x).num_invalid).tolist() == [[4], [4]]
