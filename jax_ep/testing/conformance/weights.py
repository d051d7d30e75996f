"""Checks of weights: negative, NaN and infinite weights, and their way back to the tokens."""

from typing import Any

import numpy as np

import jax_ep
from jax_ep import reference
from jax_ep.testing import routing as routings
from jax_ep.testing.cases import (
    Case,
    Data,
    assert_combined,
    assert_dispatched,
    dispatch,
    make_data,
    plan_of,
)
from jax_ep.testing.cases import round_trip as compile_round_trip
from jax_ep.testing.compare import assert_same_bits
from jax_ep.testing.conformance.check import ROUND_TRIP, Check, noted
from jax_ep.testing.conformance.sizes import LAYOUTS, make_case, seed_of
from jax_ep.testing.ranks import on_group


def combine_weights(group: jax_ep.Group, backend: str, *, layout: str, capacity: str) -> None:
    """Brings dispatched weights, and other weights, back to their tokens.

    A dispatched weight comes back unchanged, or as zero if its choice was dropped, masked or
    invalid. Other weights, NaN in rows without a token, come back as in the reference.
    """
    case = make_case(group, layout=layout, capacity=capacity)

    def fn(x: Any, ids: Any, weights: Any, other: Any) -> Any:
        out: Any = dispatch(case, group, backend, x, ids, weights)
        return [
            jax_ep.combine_weights(w, out.handle, backend=backend) for w in (out.weights, other)
        ]

    compiled = on_group(fn, group)
    rng = np.random.default_rng(7)
    for routing in routings.BY_NAME:
        with noted(f"routing {routing}"):
            data = make_data(case, routing)
            plan = plan_of(case, data.topk_idx)
            shape = reference.dispatch_weights(plan, data.topk_weights).shape
            other = rng.standard_normal(shape).astype(np.float32)
            other[plan.recv_src < 0] = np.nan
            back, other_back = compiled(data.x, data.topk_idx, data.topk_weights, other)
            assert_same_bits(back, _kept_weights(case, plan, data), what="weights")
            expected = reference.combine_weights(plan, other, ranks_per_node=case.ranks_per_node)
            assert not np.isnan(expected).any()
            assert_same_bits(other_back, expected, what="other weights")


def _kept_weights(case: Case, plan: reference.Plan, data: Data) -> Any:
    """Returns topk_weights, with zero for choices without a row."""
    is_expert = (data.topk_idx >= 0) & (data.topk_idx < case.num_experts)
    row = plan.send_row
    if case.layout == "rank":
        rank = np.where(is_expert, data.topk_idx // case.experts_per_rank, 0)
        row = np.take_along_axis(plan.send_row, rank, axis=-1)
    return np.where(is_expert & (row >= 0), data.topk_weights, np.float32(0))


def special_weights(
    group: jax_ep.Group, backend: str, *, layout: str, weights_at: str | None
) -> None:
    """Passes negative, infinite and NaN weights; each reaches only its own row and token."""
    case = make_case(group, layout=layout, dtype="f32", capacity="half", weights_at=weights_at)
    fn = compile_round_trip(case, group, backend)
    for routing in ("masked", "skewed", "invalid_ids"):
        with noted(f"routing {routing}"):
            data = make_data(case, routing, seed_of(routing))
            weights = data.topk_weights
            weights -= 0.5
            weights[:, 1], weights[:, 2], weights[:, 3] = np.inf, np.nan, -0.0
            # A choice without an expert has no weight, so NaN there must not spread.
            weights[(data.topk_idx < 0) | (data.topk_idx >= case.num_experts)] = np.nan
            plan = plan_of(case, data.topk_idx)
            data.rows[plan.recv_src < 0] = np.nan
            out, y = fn(*data.operands())
            assert_dispatched(case, data, out)
            with np.errstate(invalid="ignore"):  # inf - inf, and inf times zero
                assert_combined(case, data, plan, y)
            sent = reference.dispatch_weights(plan, weights)
            assert np.isnan(sent).any()
            assert not np.isnan(sent[plan.recv_src < 0]).any()


def _special(*of: tuple[str, str | None]) -> list[Check]:
    return [
        Check(special_weights, ROUND_TRIP, {"layout": layout, "weights_at": weights_at})
        for layout, weights_at in of
    ]


CHECKS = (
    *(
        Check(
            combine_weights,
            frozenset({"dispatch", "combine_weights"}),
            {"layout": layout, "capacity": capacity},
        )
        for layout in LAYOUTS
        for capacity in ("ample", "half")
    ),
    *_special(("rank", None), ("expert", "tokens")),
)
FULL = (*CHECKS, *_special(("expert", "rows")))
