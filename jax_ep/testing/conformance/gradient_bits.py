"""Checks of gradients that are moves or ordered sums, to the bit.

Cotangents are NaN in rows without a token. The gradient of combine's weights is an exception: XLA
or the back end chooses the order of its dot product. So the check allows a tolerance, but demands
zero for rows without a token. The gradient of a bias is the cotangent itself.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np

import jax_ep
from jax_ep import reference
from jax_ep.testing import routing as routings
from jax_ep.testing.cases import DTYPES, Case, dispatch, expected_sums, make_data, plan_of
from jax_ep.testing.compare import assert_close, assert_same_bits
from jax_ep.testing.conformance.check import ROUND_TRIP, Check, noted
from jax_ep.testing.conformance.sizes import LAYOUTS, make_case, seed_of
from jax_ep.testing.ranks import on_group

_WEIGHT_TOLERANCE = 1e-5


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Given:
    """Arrays [R, ...] of all ranks. Elements without a token are NaN, except in x and the ids."""

    topk_idx: Any
    topk_weights: Any
    x: Any
    rows: Any
    at_rows: Any  # weights in the form that dispatch returns
    bias: Any
    x_bar: Any  # cotangent of the received rows
    at_rows_bar: Any  # cotangent of the received weights
    y_bar: Any  # cotangent of the result of combine
    topk_weights_bar: Any  # cotangent of the result of combine_weights


def gradients_to_the_bit(
    group: jax_ep.Group,
    backend: str,
    *,
    layout: str,
    dtype: str,
    capacity: str,
    weights_at: str | None,
) -> None:
    """Compares gradients of dispatch, with and without a handle, combine and combine_weights."""
    alignment = 3 if layout == "expert" else 1
    case = make_case(
        group,
        layout=layout,
        dtype=dtype,
        capacity=capacity,
        weights_at=weights_at,
        expert_alignment=alignment,
    )
    compiled = on_group(partial(_gradients, case, group, backend), group)
    for routing in routings.BY_NAME:
        with noted(f"routing {routing}"):
            topk_idx = make_data(case, routing, seed_of(routing)).topk_idx
            plan = plan_of(case, topk_idx)
            given = _make_given(case, plan, topk_idx)
            got = compiled(given)
            for name, value in _expected(case, plan, given).items():
                assert_same_bits(got.pop(name), value, what=f"gradient of {name}")
            for name, value in got.items():
                assert name == "weights of combine"
                expected = _weights_gradient(case, plan, given)
                assert_close(value, expected, tolerance=_WEIGHT_TOLERANCE, what=name)


def _gradients(case: Case, group: jax_ep.Group, backend: str, given: _Given) -> dict[str, Any]:
    """Computes the gradients of one rank by jax.vjp."""

    def routed(x: Any, weights: Any) -> Any:
        out = dispatch(case, group, backend, x, given.topk_idx, weights)
        return (out.x, out.weights), out.handle

    _, bar, handle = jax.vjp(routed, given.x, given.topk_weights, has_aux=True)
    x, topk_weights = bar((given.x_bar, given.at_rows_bar))

    def along(x: Any) -> Any:
        return jax_ep.dispatch(x, handle=handle, backend=backend).x

    def combined(rows: Any, bias: Any, weights: Any) -> Any:
        return jax_ep.combine(rows, handle, weights=weights, bias=bias, backend=backend)

    def weights_back(w: Any) -> Any:
        return jax_ep.combine_weights(w, handle, backend=backend)

    weights = {None: None, "rows": given.at_rows, "tokens": given.topk_weights}[case.weights_at]
    rows, bias, weights = jax.vjp(combined, given.rows, given.bias, weights)[1](given.y_bar)
    found = {
        "x": x,
        "topk_weights": topk_weights,
        "x along a handle": jax.vjp(along, given.x)[1](given.x_bar)[0],
        "rows": rows,
        "bias": bias,
        "combine_weights": jax.vjp(weights_back, given.at_rows)[1](given.topk_weights_bar)[0],
    }
    return found if weights is None else {**found, "weights of combine": weights}


def _expected(case: Case, plan: reference.Plan, given: _Given) -> dict[str, Any]:
    x = expected_sums(case, plan, given.x_bar)
    is_rank_layout = case.layout == "rank"
    to_rows = reference.dispatch if is_rank_layout else reference.dispatch_weights
    return {
        "x": x,
        "topk_weights": reference.weights_to_tokens(plan, given.at_rows_bar),
        "x along a handle": x,
        "rows": reference.combine_gradient(plan, given.y_bar, _weights(case, plan, given)),
        "bias": given.y_bar,
        "combine_weights": to_rows(plan, given.topk_weights_bar),
    }


def _weights(case: Case, plan: reference.Plan, given: _Given) -> Any:
    """Returns the weights of combine at the rows."""
    if case.weights_at == "tokens":
        return reference.dispatch_weights(plan, given.topk_weights)
    return given.at_rows if case.weights_at == "rows" else None


def _weights_gradient(case: Case, plan: reference.Plan, given: _Given) -> Any:
    moved = reference.dispatch(plan, given.y_bar).astype(np.float64)
    dot = np.sum(given.rows.astype(np.float64) * moved, axis=-1).astype(np.float32)
    dot = np.where(plan.recv_src >= 0, dot, np.float32(0))
    return reference.weights_to_tokens(plan, dot) if case.weights_at == "tokens" else dot


def _make_given(case: Case, plan: reference.Plan, topk_idx: Any) -> _Given:
    rng = np.random.default_rng(6)

    def normal(shape: tuple[int, ...], where: Any, dtype: Any = np.float32) -> Any:
        values = rng.standard_normal(shape).astype(np.float32)
        values[..., ::5] = -0.0
        values[~np.broadcast_to(where, shape)] = np.nan
        return values.astype(dtype)

    kind = DTYPES[case.dtype]
    tokens, rows = topk_idx.shape[:2], (case.num_ranks, case.capacity)
    has_token = (plan.recv_src >= 0)[..., None]
    is_sent = (plan.send_row >= 0).any(-1, keepdims=True)
    at_rows = plan.recv_topk_idx >= 0 if case.layout == "rank" else plan.recv_k >= 0
    is_choice = reference.weights_to_tokens(plan, at_rows)
    return _Given(
        topk_idx=topk_idx,
        topk_weights=normal(topk_idx.shape, is_choice),
        x=normal((*tokens, case.hidden), True, kind),
        rows=normal((*rows, case.hidden), has_token, kind),
        at_rows=normal(at_rows.shape, at_rows),
        bias=normal((*tokens, case.hidden), True, kind),
        x_bar=normal((*rows, case.hidden), has_token, kind),
        at_rows_bar=normal(at_rows.shape, at_rows),
        y_bar=normal((*tokens, case.hidden), is_sent, kind),
        # In the rank layout a whole row of weights goes to a rank, with choices of other ranks.
        topk_weights_bar=normal(topk_idx.shape, is_sent if case.layout == "rank" else is_choice),
    )


_WEIGHTS_AT = {"rank": (None,), "expert": (None, "rows", "tokens")}


def _check(layout: str, dtype: str, capacity: str, weights_at: str | None) -> Check:
    params = {"layout": layout, "dtype": dtype, "capacity": capacity, "weights_at": weights_at}
    return Check(gradients_to_the_bit, ROUND_TRIP | {"combine_weights"}, params)


CHECKS = (
    _check("rank", "bf16", "half", None),
    _check("expert", "f32", "half", "rows"),
    _check("expert", "bf16", "half", "tokens"),
)
FULL = tuple(
    _check(layout, dtype, capacity, weights_at)
    for layout in LAYOUTS
    for dtype in DTYPES
    for capacity in ("ample", "half")
    for weights_at in _WEIGHTS_AT[layout]
)
