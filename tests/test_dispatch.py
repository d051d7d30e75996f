"""dispatch against the reference, to the bit."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import ROUTINGS, Case, assert_combined, assert_dispatched, make_data, plan_of, run

import jax_ep
from jax_ep import reference
from jax_ep.testing.compare import assert_same_bits
from jax_ep.testing.ranks import on_ranks

NUM_RANKS = (1, 2, 3, 4, 6, 8)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("num_ranks", NUM_RANKS)
def test_round_trip_matches_reference(groups, num_ranks, layout, backend, routing):
    weights_at = None if layout == "rank" else "rows"
    case = Case(num_ranks, layout, weights_at=weights_at, num_biases=1)
    data = make_data(case, routing)
    out, y = run(case, groups(num_ranks), backend, data)
    plan = assert_dispatched(case, data, out)
    assert plan.num_dropped.sum() == 0
    assert_combined(case, data, plan, y)


@pytest.mark.slow
@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize(
    "dtype", [jnp.bfloat16, jnp.float16, jnp.float32], ids=lambda d: d.__name__
)
@pytest.mark.parametrize("num_topk", [1, 8, 32])
@pytest.mark.parametrize("num_ranks", NUM_RANKS)
def test_full_matrix(groups, num_ranks, layout, backend, num_topk, dtype, check_vma):
    case = Case(
        num_ranks, layout, num_topk=num_topk, experts_per_rank=32, num_tokens=9, dtype=dtype
    )
    for seed, routing in enumerate(ROUTINGS):
        for capacity in (None, 1, 40):
            tight = dataclasses.replace(case, recv_capacity=capacity)
            data = make_data(tight, routing, seed)
            out, y = run(tight, groups(num_ranks), backend, data, check_vma=check_vma)
            assert_combined(tight, data, assert_dispatched(tight, data, out), y)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.float32], ids=lambda d: d.__name__)
def test_other_dtypes(groups, layout, backend, dtype):
    case = Case(4, layout, dtype=dtype, weights_at=None if layout == "rank" else "tokens")
    data = make_data(case, "masked")
    out, y = run(case, groups(4), backend, data)
    assert_combined(case, data, assert_dispatched(case, data, out), y)


@pytest.mark.parametrize("slack", [0, -1, -5])
@pytest.mark.parametrize("alignment", [1, 4])
def test_capacity_exact_and_overflow(groups, layout, backend, alignment, slack):
    """The largest rank needs exactly recv_capacity - slack rows."""
    if layout == "rank" and alignment != 1:
        alignment = 1
    ample = Case(4, layout, expert_alignment=alignment)
    needed = plan_of(ample, make_data(ample, "skewed")).num_recv.max()
    case = dataclasses.replace(ample, recv_capacity=int(needed) + slack)
    data = make_data(case, "skewed")
    out, y = run(case, groups(4), backend, data)
    plan = assert_dispatched(case, data, out)
    assert (plan.num_dropped.sum() > 0) == (slack < 0)
    assert_combined(case, data, plan, y)


@pytest.mark.parametrize("recv_capacity", [1, 2, 7])
def test_capacity_far_too_small(groups, layout, backend, recv_capacity):
    case = Case(3, layout, recv_capacity=recv_capacity)
    for routing in ("balanced", "all_to_one_rank"):
        data = make_data(case, routing)
        out, y = run(case, groups(3), backend, data)
        assert_combined(case, data, assert_dispatched(case, data, out), y)


@pytest.mark.parametrize("fill", ["zeros", "padding", "none"])
def test_fill(groups, layout, backend, fill):
    alignment = 8 if layout == "expert" else 1
    case = Case(4, layout, fill=fill, expert_alignment=alignment)
    data = make_data(case, "skewed")
    out, _ = run(case, groups(4), backend, data)
    assert_dispatched(case, data, out)


@pytest.mark.parametrize("hidden", [8, 40, 8192])
def test_hidden_sizes(groups, layout, backend, hidden):
    case = Case(2, layout, hidden=hidden, num_tokens=5)
    data = make_data(case, "balanced")
    out, y = run(case, groups(2), backend, data)
    assert_combined(case, data, assert_dispatched(case, data, out), y)


def test_repeated_expert_keeps_both_rows(groups, layout, backend):
    """A caller's error, but a defined one: as many rows, or counts, as choices."""
    case = Case(2, layout)
    data = make_data(case, "balanced")
    data.topk_idx[:, ::2, 1] = data.topk_idx[:, ::2, 0]
    out, y = run(case, groups(2), backend, data)
    assert_combined(case, data, assert_dispatched(case, data, out), y)


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


def test_payload_bits_pass_unchanged(groups, layout, backend):
    """NaN payloads, infinities, negative zero and subnormals are moved, not computed with."""
    case = Case(2, layout, dtype=jnp.float32)
    data = make_data(case, "balanced")
    bits = np.array([0x7FC12345, 0xFF800000, 0x80000000, 0x00000001, 0x7F800001], np.uint32)
    data.x[:, :, :5] = bits.view(np.float32)
    out, _ = run(case, groups(2), backend, data)
    plan = plan_of(case, data)
    got = np.asarray(out.x).view(np.uint32)
    expected = reference.dispatch(plan, data.x.view(np.uint32))
    assert_same_bits(got, expected)


def test_two_runs_give_equal_bits(groups, layout, backend):
    case = Case(8, layout, weights_at=None if layout == "rank" else "rows")
    data = make_data(case, "skewed")
    first = jax.tree.leaves(run(case, groups(8), backend, data))
    for _ in range(5):
        for a, b in zip(jax.tree.leaves(run(case, groups(8), backend, data)), first, strict=True):
            assert_same_bits(a, b)


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
