"""Dispatches of ranks that each hold the tokens of several sources, against the reference."""

from functools import partial
from typing import Any, NamedTuple

import numpy as np

from jax_ep import reference
from jax_ep._src.base.options import ExchangeMode, Fill, Layout
from jax_ep._src.base.spec import DispatchSpec, Route, Routes
from jax_ep._src.ops.dispatch import call
from jax_ep.testing.compare import assert_same_bits
from jax_ep.testing.ranks import on_ranks

NUM_LOCAL, NUM_TOPK = 3, 4
_SHARE_NONE, _SHARE_INVALID = 0.15, 0.1
SHARE_OF_EXPERTS = (1 - _SHARE_NONE) * (1 - _SHARE_INVALID)


class Case(NamedTuple):
    """Sizes of a dispatch, with `num_tokens` of each source."""

    layout: str
    num_parts: int
    num_tokens: int
    recv_capacity: int
    expert_alignment: int = 1
    expert_stride: int = 0
    fill: str = "zeros"
    hidden: int = 8


def dispatch(case: Case, group: Any, backend: str, *operands: Any) -> Any:
    """Dispatches ids, weights and arrays of rows, all [R, P * T, ...], through the seam."""
    spec = DispatchSpec(
        group=group.spec,
        routes=Routes(*[Route(backend, 16)] * 3),
        layout=Layout(case.layout),
        recv_capacity=case.recv_capacity,
        op="dispatch",
        mode=ExchangeMode.THROUGHPUT,
        few_sms=None,
        num_experts=group.num_ranks * NUM_LOCAL,
        expert_alignment=case.expert_alignment,
        fill=Fill(case.fill),
        expert_stride=case.expert_stride,
    )
    run = partial(call.dispatch, spec, num_parts=case.num_parts)
    return on_ranks(lambda ids, weights, *rows: run(ids, weights, rows), group.mesh)(*operands)


def _make_topk_idx(case: Case, num_ranks: int, rng: np.random.Generator) -> Any:
    """Returns ids [sources, T, K]: some choices are none, invalid, or of an expert named twice."""
    shape = (case.num_parts * num_ranks, case.num_tokens, NUM_TOPK)
    num_experts = num_ranks * NUM_LOCAL
    ids = rng.integers(0, num_experts, shape)
    ids = np.where(rng.random(shape) < _SHARE_NONE, -1, ids)
    strange = rng.choice([-2, num_experts, 2**31 - 1], shape)
    ids = np.where(rng.random(shape) < _SHARE_INVALID, strange, ids)
    return ids.astype(np.int32)


def _plan(case: Case, num_ranks: int, ids: Any) -> reference.Plan:
    """Returns the plan of a flat dispatch in which each source is a rank.

    The ranks behind the first ones have experts that no token names.
    """
    is_expert = (ids >= 0) & (ids < num_ranks * NUM_LOCAL)
    return reference.make_plan(
        np.where(is_expert, ids, np.where(ids == -1, -1, -2)),
        num_experts=len(ids) * NUM_LOCAL,
        layout=case.layout,
        recv_capacity=case.recv_capacity,
        expert_alignment=case.expert_alignment,
        expert_stride=case.expert_stride,
    )


def assert_in_order_of_sources(case: Case, group: Any, backend: str) -> int:
    """Asserts every result of a dispatch to the bit. Returns the number of dropped rows."""
    num_ranks = group.num_ranks
    rng = np.random.default_rng(case.num_tokens)
    ids = _make_topk_idx(case, num_ranks, rng)
    weights = rng.random(ids.shape, np.float32)
    x = rng.standard_normal((*ids.shape[:2], case.hidden)).astype(np.float32)
    marks = rng.integers(0, 256, (*ids.shape[:2], 5)).astype(np.uint8)

    def at_ranks(of_sources: Any) -> Any:
        """Returns [R, P * T, ...] from [P * R, T, ...]: part p of rank r is source p * R + r."""
        parts = of_sources.reshape(-1, num_ranks, *of_sources.shape[1:])
        return np.concatenate(list(parts), axis=1)

    got = dispatch(case, group, backend, *map(at_ranks, (ids, weights, x, marks)))
    plan = _plan(case, num_ranks, ids)
    is_rank_layout = case.layout == "rank"
    send_row = plan.send_row[:, :, :num_ranks] if is_rank_layout else plan.send_row
    expected = {
        "group_sizes": plan.group_sizes[:num_ranks],
        "num_recv": plan.num_recv[:num_ranks, None],
        "num_dropped": plan.num_dropped[:num_ranks, None],
        "num_invalid": plan.num_invalid.reshape(-1, num_ranks).sum(axis=0, dtype=np.int32)[:, None],
        "recv_src": plan.recv_src[:num_ranks],
        "recv_k": None if is_rank_layout else plan.recv_k[:num_ranks],
        "send_row": at_ranks(send_row),
        "recv_topk_idx": plan.recv_topk_idx[:num_ranks] if is_rank_layout else None,
        "recv_weights": reference.dispatch_weights(plan, weights)[:num_ranks],
    }
    for name, value in expected.items():
        if value is None:
            assert getattr(got, name) is None
        else:
            assert_same_bits(getattr(got, name), value, what=name)
    is_defined = case.fill == "zeros" or plan.recv_src[:num_ranks] >= 0
    where = np.broadcast_to(is_defined, (num_ranks, case.recv_capacity))
    for rows, sent in zip(got.rows, (x, marks), strict=True):
        assert_same_bits(rows, reference.dispatch(plan, sent)[:num_ranks], where=where)
    return int(plan.num_dropped[:num_ranks].sum())
