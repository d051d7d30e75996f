"""dispatch of ranks that each hold the tokens of several sources, part behind part."""

from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from jax_ep import reference
from jax_ep._src.base.options import ExchangeMode, Fill, Layout
from jax_ep._src.base.spec import DispatchSpec, Route, Routes
from jax_ep._src.ops.dispatch import call
from jax_ep.testing.compare import assert_same_bits
from jax_ep.testing.ranks import on_ranks

NUM_RANKS, NUM_LOCAL, NUM_TOPK, HIDDEN = 4, 3, 4, 8
NUM_EXPERTS = NUM_RANKS * NUM_LOCAL


class Case(NamedTuple):
    """Sizes of a dispatch, with `num_tokens` of each source."""

    layout: str
    num_parts: int
    num_tokens: int
    recv_capacity: int
    expert_alignment: int = 1
    expert_stride: int = 0
    fill: str = "zeros"


CASES = {
    "rank": Case("rank", 2, 5, 2 * 4 * 5),
    "rank_drops": Case("rank", 3, 6, 40),
    "rank_drops_all_parts_but_one": Case("rank", 3, 7, 17),
    "expert": Case("expert", 2, 5, 2 * 4 * 5 * 4, 8),
    "expert_drops": Case("expert", 3, 6, 50, 4),
    "expert_drops_all_parts_but_one": Case("expert", 3, 7, 20),
    "expert_stride": Case("expert", 2, 6, NUM_LOCAL * 13, 1, 13, "padding"),
    "one_part": Case("expert", 1, 6, 12),
}


def _spec(case: Case, group: Any, backend: str = "cpu") -> DispatchSpec:
    return DispatchSpec(
        group=group.spec,
        routes=Routes(*[Route(backend, 1)] * 3),
        layout=Layout(case.layout),
        recv_capacity=case.recv_capacity,
        op="dispatch",
        mode=ExchangeMode.THROUGHPUT,
        few_sms=None,
        num_experts=NUM_EXPERTS,
        expert_alignment=case.expert_alignment,
        fill=Fill(case.fill),
        expert_stride=case.expert_stride,
    )


def _make_topk_idx(case: Case, rng: np.random.Generator) -> Any:
    """Returns ids [sources, T, K]: some choices are none, invalid, or of an expert named twice."""
    shape = (case.num_parts * NUM_RANKS, case.num_tokens, NUM_TOPK)
    ids = rng.integers(0, NUM_EXPERTS, shape)
    ids = np.where(rng.random(shape) < 0.15, -1, ids)
    ids = np.where(rng.random(shape) < 0.1, rng.choice([-2, NUM_EXPERTS, 2**31 - 1], shape), ids)
    return ids.astype(np.int32)


def _at_ranks(of_sources: Any) -> Any:
    """Returns [R, P * T, ...] from [P * R, T, ...]: part p of rank r is source p * R + r."""
    parts = of_sources.reshape(-1, NUM_RANKS, *of_sources.shape[1:])
    return np.concatenate(list(parts), axis=1)


def _plan(case: Case, ids: Any) -> reference.Plan:
    """Returns the plan of a flat dispatch in which each source is a rank.

    The ranks behind the first ones have experts that no token names.
    """
    is_expert = (ids >= 0) & (ids < NUM_EXPERTS)
    return reference.make_plan(
        np.where(is_expert, ids, np.where(ids == -1, -1, -2)),
        num_experts=len(ids) * NUM_LOCAL,
        layout=case.layout,
        recv_capacity=case.recv_capacity,
        expert_alignment=case.expert_alignment,
        expert_stride=case.expert_stride,
    )


CHOSEN = [("cpu", name) for name in CASES] + [("xla", "rank_drops"), ("xla", "expert_drops")]


@pytest.mark.parametrize(("backend", "sizes"), CHOSEN)
def test_rows_are_in_the_order_of_the_sources(groups, backend, sizes):
    case = CASES[sizes]
    group = groups(NUM_RANKS)
    rng = np.random.default_rng(case.num_tokens)
    ids = _make_topk_idx(case, rng)
    weights = rng.random(ids.shape, np.float32)
    x = rng.standard_normal((*ids.shape[:2], HIDDEN)).astype(np.float32)
    marks = rng.integers(0, 256, (*ids.shape[:2], 5)).astype(np.uint8)
    operands = [_at_ranks(a) for a in (ids, weights, x, marks)]
    run = partial(call.dispatch, _spec(case, group, backend), num_parts=case.num_parts)
    got = on_ranks(lambda ids, weights, *rows: run(ids, weights, rows), group.mesh)(*operands)

    plan = _plan(case, ids)
    assert not case.num_tokens > 5 or np.any(plan.num_dropped[:NUM_RANKS])
    is_rank_layout = case.layout == "rank"
    send_row = plan.send_row[:, :, :NUM_RANKS] if is_rank_layout else plan.send_row
    expected = {
        "group_sizes": plan.group_sizes[:NUM_RANKS],
        "num_recv": plan.num_recv[:NUM_RANKS, None],
        "num_dropped": plan.num_dropped[:NUM_RANKS, None],
        "num_invalid": plan.num_invalid.reshape(-1, NUM_RANKS).sum(axis=0, dtype=np.int32)[:, None],
        "recv_src": plan.recv_src[:NUM_RANKS],
        "recv_k": None if is_rank_layout else plan.recv_k[:NUM_RANKS],
        "send_row": _at_ranks(send_row),
        "recv_topk_idx": plan.recv_topk_idx[:NUM_RANKS] if is_rank_layout else None,
        "recv_weights": reference.dispatch_weights(plan, weights)[:NUM_RANKS],
    }
    for name, value in expected.items():
        if value is None:
            assert getattr(got, name) is None
        else:
            assert_same_bits(getattr(got, name), value, what=name)
    is_defined = case.fill == "zeros" or plan.recv_src[:NUM_RANKS] >= 0
    where = np.broadcast_to(is_defined, (NUM_RANKS, case.recv_capacity))
    for rows, sent in zip(got.rows, (x, marks), strict=True):
        assert_same_bits(rows, reference.dispatch(plan, sent)[:NUM_RANKS], where=where)


def _dispatch(group: Any, case: Case, *, num_tokens: int, backend: str = "cpu") -> Any:
    ids = np.zeros((NUM_RANKS, num_tokens, NUM_TOPK), np.int32)
    x = np.zeros((NUM_RANKS, num_tokens, HIDDEN), np.float32)
    run = partial(call.dispatch, _spec(case, group, backend), num_parts=case.num_parts)
    return jax.block_until_ready(on_ranks(lambda ids, x: run(ids, None, (x,)), group.mesh)(ids, x))


def test_parts_of_different_sizes_are_refused(groups):
    with pytest.raises(Exception, match="7 tokens of a rank must be a multiple of num_parts=2"):
        _dispatch(groups(NUM_RANKS), CASES["rank"], num_tokens=7)


def test_kernels_for_few_tokens_refuse_parts(groups, monkeypatch):
    # The kernels for few tokens are never chosen for parts.
    few = SimpleNamespace(THROUGHPUT=ExchangeMode.LOW_LATENCY, LOW_LATENCY=None)
    monkeypatch.setattr(call, "ExchangeMode", few)
    with pytest.raises(Exception, match="low_latency takes tokens of one source a rank"):
        _dispatch(groups(NUM_RANKS), CASES["rank"], num_tokens=10)
