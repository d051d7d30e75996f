"""Checks of dispatch and combine against the reference, to the bit."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_ep
from jax_ep import reference
from jax_ep.testing import routing as routings
from jax_ep.testing.cases import (
    DTYPES,
    Case,
    Data,
    assert_combined,
    assert_dispatched,
    dispatch,
    expected_sums,
    make_data,
    plan_of,
)
from jax_ep.testing.cases import round_trip as compile_round_trip
from jax_ep.testing.compare import assert_same_bits, shards
from jax_ep.testing.conformance.check import ROUND_TRIP, Check, noted
from jax_ep.testing.conformance.sizes import (
    LAYOUTS,
    MORE_VALUES,
    VALUES,
    make_case,
    mix,
    seed_of,
)
from jax_ep.testing.ranks import on_group


def round_trip(
    group: jax_ep.Group,
    backend: str,
    *,
    capacity: str = "ample",
    check_vma: bool = True,
    **params: Any,
) -> None:
    """Compares every field of the dispatch, and the combined rows, for every named routing."""
    case = make_case(group, capacity=capacity, **params)
    fn = compile_round_trip(case, group, backend, check_vma)
    for routing in routings.BY_NAME:
        with noted(f"routing {routing}, {case}"):
            data = make_data(case, routing, seed_of(routing))
            out, y = fn(*data.operands())
            plan = assert_dispatched(case, data, out)
            assert_combined(case, data, plan, y)
            # A capacity that does not do what its name says would test nothing.
            dropped = int(plan.num_dropped.sum())
            if capacity in ("ample", "beyond"):
                assert dropped == 0, dropped
            elif routing == "skewed":
                assert (dropped > 0) == (case.capacity < _needed(case, data)), dropped


def _needed(case: Case, data: Data) -> int:
    return int(np.max(plan_of(replace(case, recv_capacity=None), data.topk_idx).num_recv))


def repeated_expert(group: jax_ep.Group, backend: str, *, layout: str) -> None:
    """Names an expert twice in a token: a caller's error, but with a defined result."""
    case = make_case(group, layout=layout)
    data = make_data(case, "balanced")
    data.topk_idx[:, ::2, 1] = data.topk_idx[:, ::2, 0]
    _assert_round_trip(group, backend, case, data)


def nan_and_inf_reach_their_token_only(group: jax_ep.Group, backend: str, *, layout: str) -> None:
    """Puts NaN and infinity into rows; combine treats them like other rows."""
    case = make_case(group, layout=layout, dtype="f32")
    data = make_data(case, "balanced")
    plan = plan_of(case, data.topk_idx)
    data.rows[0, 0], data.rows[-1, 1] = np.nan, np.inf
    expected = expected_sums(case, plan, data.rows)
    assert np.isnan(expected).any()
    assert np.isinf(expected).any()
    _assert_round_trip(group, backend, case, data)


def garbage_does_not_leak(
    group: jax_ep.Group, backend: str, *, layout: str, weights_at: str | None, capacity: str
) -> None:
    """Puts NaN into rows without a token; combine must not read them."""
    case = make_case(group, layout=layout, capacity=capacity, weights_at=weights_at)
    fn = compile_round_trip(case, group, backend)
    for routing in ("masked", "skewed", "all_empty"):
        with noted(f"routing {routing}"):
            data = make_data(case, routing, seed_of(routing))
            plan = plan_of(case, data.topk_idx)
            data.rows[plan.recv_src < 0] = np.nan
            assert not np.isnan(expected_sums(case, plan, data.rows)).any()
            assert_combined(case, data, plan, fn(*data.operands())[1])


def payload_bits_pass_unchanged(
    group: jax_ep.Group, backend: str, *, layout: str, dtype: str
) -> None:
    """Dispatches every pattern of bits; rows are moved, not computed with."""
    case = make_case(group, layout=layout, dtype=dtype, row_bytes=512)
    data = make_data(case, "balanced")
    bits = f"u{data.x.dtype.itemsize}"
    patterns = np.random.default_rng(1).integers(0, 256, (*data.x.shape[:2], 512), np.uint8)
    special = np.array([np.nan, -np.nan, np.inf, -np.inf, -0.0]).astype(data.x.dtype)
    x = patterns.view(data.x.dtype)
    x[:, :, :5] = special
    x.view(bits)[:, :, 5] = special.view(bits)[0] ^ 1  # another NaN than the usual one
    x.view(bits)[:, :, 6] = 1  # the smallest subnormal
    out = on_group(lambda x, i: dispatch(case, group, backend, x, i), group)(x, data.topk_idx)
    expected = reference.dispatch(plan_of(case, data.topk_idx), x.view(bits)).view(x.dtype)
    assert_same_bits(out.x, expected, nan_bits=True)


def subnormals_are_kept(group: jax_ep.Group, backend: str, *, layout: str, dtype: str) -> None:
    """Combines rows of subnormals, whose sums must not become zero."""
    case = make_case(group, layout=layout, dtype=dtype)
    data = make_data(case, "balanced")
    tiny = float(jnp.finfo(DTYPES[dtype]).tiny) / 4  # type: ignore[no-untyped-call]
    data.rows[:] = (data.rows.astype(np.float32) * tiny).astype(data.rows.dtype)
    assert expected_sums(case, plan_of(case, data.topk_idx), data.rows).any()
    _assert_round_trip(group, backend, case, data)


def sums_of_negative_zeros_are_positive(
    group: jax_ep.Group, backend: str, *, layout: str, dtype: str, weights_at: str | None
) -> None:
    """Adds negative zeros: sums begin with +0, in gradients too. A sum rounded to -0 stays -0."""
    case = make_case(
        group, layout=layout, dtype=dtype, weights_at=weights_at, num_topk=2, num_biases=1
    )

    def fn(x: Any, ids: Any, weights: Any, rows: Any, bias: Any) -> Any:
        def send(x: Any) -> Any:
            out = dispatch(case, group, backend, x, ids, weights)
            return out.x, out

        _, back, out = jax.vjp(send, x, has_aux=True)
        at = {None: None, "rows": out.weights, "tokens": weights}[weights_at]
        y = jax_ep.combine(rows, out.handle, weights=at, bias=bias, backend=backend)
        return y, back(rows)[0]

    compiled = on_group(fn, group)
    for routing in routings.BY_NAME:
        with noted(f"routing {routing}"):
            data = make_data(case, routing, seed_of(routing))
            rows, bias = (_mostly_negative_zeros(a) for a in (data.rows, *data.biases))
            y, grad = compiled(data.x, data.topk_idx, data.topk_weights, rows, bias)
            plan = plan_of(case, data.topk_idx)
            at = None if weights_at is None else reference.dispatch_weights(plan, data.topk_weights)
            assert_same_bits(y, expected_sums(case, plan, rows, at, (bias,)), what="combine")
            assert_same_bits(grad, expected_sums(case, plan, rows), what="gradient of x")


def _mostly_negative_zeros(like: Any) -> Any:
    """Makes rows of -0 and a few other numbers; times a weight, some of them are zero in f16."""
    rng = np.random.default_rng(6)
    others = rng.choice([-1.0, 1.0, -(2.0**-24), 2.0**-24, 0.0], like.shape)
    return np.where(rng.random(like.shape) < 0.8, -0.0, others).astype(like.dtype)


def runs_give_equal_bits(
    group: jax_ep.Group, backend: str, *, layout: str, weights_at: str | None, num_runs: int
) -> None:
    """Repeats a run: the order in which rows arrive must not show in the results."""
    case = make_case(group, layout=layout, weights_at=weights_at, num_topk=8, row_bytes=1040)
    operands = make_data(case, "skewed").operands()
    fn = compile_round_trip(case, group, backend)
    first = _as_bytes(fn(*operands))
    for run in range(1, num_runs):
        assert _as_bytes(fn(*operands)) == first, f"run {run} differs from the first"


def _as_bytes(results: Any) -> list[bytes]:
    return [s.tobytes() for leaf in jax.tree.leaves(results) for _, s in shards(leaf)]


def routings_in_one_scan(
    group: jax_ep.Group, backend: str, *, layout: str, capacity: str, check_vma: bool
) -> None:
    """Makes many calls in a row, each with another routing, and each on the last one's result."""
    weights_at = None if layout == "rank" else "rows"
    case = make_case(
        group, layout=layout, dtype="f32", capacity=capacity, weights_at=weights_at, row_bytes=64
    )
    steps = [make_data(case, r, seed) for seed in (1, 2) for r in routings.BY_NAME]
    names = ("x", "topk_idx", "topk_weights")
    given = [np.stack([getattr(s, name) for s in steps], axis=1) for name in names]

    def fn(start: Any, *given: Any) -> Any:
        def step(carry: Any, now: Any) -> Any:
            x, ids, weights = now
            out = dispatch(case, group, backend, carry, ids, weights)
            at_rows = None if weights_at is None else out.weights
            y = jax_ep.combine(out.x, out.handle, weights=at_rows, backend=backend)
            return y + x, (y, out.num_recv, out.num_dropped)

        return jax.lax.scan(step, start, given)[1]

    ys, num_recv, num_dropped = on_group(fn, group, check_vma=check_vma)(steps[0].x, *given)
    expected: dict[str, list[Any]] = {"num_recv": [], "num_dropped": [], "combine": []}
    x = steps[0].x
    for now in steps:
        plan = plan_of(case, now.topk_idx)
        weights = None
        if weights_at is not None:
            weights = reference.dispatch_weights(plan, now.topk_weights)
        y = expected_sums(case, plan, reference.dispatch(plan, x), weights)
        made = (plan.num_recv[:, None], plan.num_dropped[:, None], y)
        for field, value in zip(expected.values(), made, strict=True):
            field.append(value)
        x = y + now.x
    for (name, field), got in zip(expected.items(), (num_recv, num_dropped, ys), strict=True):
        assert_same_bits(got, np.stack(field, axis=1), what=name)


def _assert_round_trip(group: jax_ep.Group, backend: str, case: Case, data: Data) -> None:
    out, y = compile_round_trip(case, group, backend)(*data.operands())
    assert_combined(case, data, assert_dispatched(case, data, out), y)


_FLUSHES = {("xla", "cpu"): "XLA:CPU flushes subnormals"}
_CROSSED = {"rank": ("dtype", "num_topk"), "expert": ("dtype", "num_biases", "weights_at")}


def _round_trips(*, full: bool) -> list[Check]:
    found = []
    for layout in LAYOUTS:
        values, crossed = VALUES[layout], _CROSSED[layout]
        if full:
            more = {name: more for name, more in MORE_VALUES.items() if name in values}
            values = {**values, **more, "check_vma": (True, False)}
            crossed = ("dtype", "num_topk", "capacity", "check_vma")
        found += [
            Check(round_trip, ROUND_TRIP, {"layout": layout, **row})
            for row in mix(values, crossed=crossed)
        ]
    return found


def _special() -> list[Check]:
    # Many products in f32 show whether a multiply-add was contracted.
    many = {"layout": "expert", "dtype": "f32", "num_topk": 8, "row_bytes": 4080}
    found = [Check(round_trip, ROUND_TRIP, {**many, "weights_at": "rows"})]
    for aligned in ({"layout": "rank"}, {"layout": "expert", "expert_alignment": 32}):
        found.append(Check(round_trip, ROUND_TRIP, {**aligned, "capacity": "beyond"}))
    for layout in LAYOUTS:
        weights_at = None if layout == "rank" else "tokens"
        weighted = {"layout": layout, "weights_at": weights_at}
        found += [
            Check(repeated_expert, ROUND_TRIP, {"layout": layout}),
            Check(nan_and_inf_reach_their_token_only, ROUND_TRIP, {"layout": layout}),
            *(
                Check(garbage_does_not_leak, ROUND_TRIP, {**weighted, "capacity": capacity})
                for capacity in ("ample", "half")
            ),
            Check(runs_give_equal_bits, ROUND_TRIP, {**weighted, "num_runs": 5}),
        ]
        for dtype in DTYPES:
            of_dtype = {"layout": layout, "dtype": dtype}
            found += [
                Check(payload_bits_pass_unchanged, frozenset({"dispatch"}), of_dtype),
                Check(subnormals_are_kept, ROUND_TRIP, of_dtype, exempt=_FLUSHES),
                Check(
                    sums_of_negative_zeros_are_positive,
                    ROUND_TRIP,
                    {**of_dtype, "weights_at": weights_at},
                ),
            ]
        found += [
            Check(
                routings_in_one_scan,
                ROUND_TRIP,
                {"layout": layout, "capacity": capacity, "check_vma": check_vma},
            )
            for capacity, check_vma in (("ample", True), ("half", False))
        ]
    return found


CHECKS = (*_round_trips(full=False), *_special())
FULL = (*_round_trips(full=True), *CHECKS)
