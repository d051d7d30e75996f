"""Properties of the plan that must hold for all ids, under random routings."""

import functools

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from jax_ep.testing.cases import Case, assert_dispatched, make_data

NUM_RANKS, NUM_TOKENS, NUM_TOPK, EXPERTS_PER_RANK = 3, 5, 4, 2
SHAPE = (NUM_RANKS, NUM_TOKENS, NUM_TOPK)
IDS = arrays(np.int32, SHAPE, elements=st.integers(-2, NUM_RANKS * EXPERTS_PER_RANK))


@functools.cache
def _case(layout, recv_capacity, expert_alignment):
    return Case(
        NUM_RANKS,
        layout,
        num_tokens=NUM_TOKENS,
        num_topk=NUM_TOPK,
        experts_per_rank=EXPERTS_PER_RANK,
        hidden=8,
        recv_capacity=recv_capacity,
        expert_alignment=expert_alignment,
    )


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(ids=IDS, size=st.sampled_from([(3, 1), (17, 1), (17, 4), (200, 3)]))
def test_rows_never_overlap_nor_leave_the_buffer(groups, round_trips, layout, backend, ids, size):
    recv_capacity, alignment = size
    case = _case(layout, recv_capacity, 1 if layout == "rank" else alignment)
    data = make_data(case, "all_empty")
    data.topk_idx[:] = ids
    fn = round_trips(case, groups(NUM_RANKS), backend)
    out, _ = fn(*data.operands())
    assert_dispatched(case, data, out)

    send_row = np.asarray(out.handle.send_row)
    for dst in range(NUM_RANKS):
        if layout == "rank":
            rows = send_row[:, :, dst]
        else:
            rows = np.where(np.asarray(out.handle.send_rank) == dst, send_row, -1)
        rows = rows[rows >= 0]
        assert len(np.unique(rows)) == len(rows)
        assert rows.size == 0 or rows.max() < recv_capacity
        assert set(rows) == set(np.flatnonzero(np.asarray(out.handle.recv_src)[dst] >= 0))
        num_recv = int(np.asarray(out.num_recv)[dst, 0])
        assert num_recv <= recv_capacity
        assert rows.size == 0 or rows.max() < num_recv
        if layout == "expert":
            assert np.asarray(out.group_sizes)[dst].sum() == num_recv
            assert not (np.asarray(out.group_sizes)[dst] % alignment).any()
