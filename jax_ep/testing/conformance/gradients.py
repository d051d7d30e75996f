"""Checks of gradients: adjointness, and values against jax.grad of the reference."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_ep
from jax_ep import reference
from jax_ep.testing import routing as routings
from jax_ep.testing.cases import Case, Data, dispatch, expected_sums, make_data, plan_of
from jax_ep.testing.cases import round_trip as compile_round_trip
from jax_ep.testing.compare import assert_close, shards
from jax_ep.testing.conformance.check import ROUND_TRIP, Check, noted
from jax_ep.testing.conformance.sizes import LAYOUTS, make_case, seed_of
from jax_ep.testing.ranks import on_group, on_ranks, place

# XLA chooses the order of the sum in a weight's gradient, and rounds where the reference does not.
_TOLERANCES = {"f32": 1e-5, "f16": 4e-3, "bf16": 3e-2}


def combine_is_the_transpose_of_dispatch(
    group: jax_ep.Group, backend: str, *, layout: str, capacity: str
) -> None:
    """Asserts <dispatch(x), y> == <x, combine(y)>; small integers make every sum exact.

    Each rank compares its shares of both sides with the shares of the reference, whose totals are
    equal. So the totals are equal, although no process may see all of them.
    """
    case = make_case(group, layout=layout, capacity=capacity, dtype="f32")
    fn = compile_round_trip(case, group, backend)
    for routing in routings.BY_NAME:
        with noted(f"routing {routing}"):
            data = _with_integers(make_data(case, routing))
            plan = plan_of(case, data.topk_idx)
            sent, back = reference.dispatch(plan, data.x), expected_sums(case, plan, data.rows)
            assert np.vdot(sent, data.rows) == np.vdot(data.x, back)
            out, y = fn(*data.operands())
            for what, got, expected, other in (
                ("dispatch", out.x, sent, data.rows),
                ("combine", y, back, data.x),
            ):
                for index, values in shards(got):
                    left, right = (
                        np.vdot(values, other[index]),
                        np.vdot(expected[index], other[index]),
                    )
                    assert left == right, f"{what}: {index}: {left} != {right}"


def _with_integers(data: Data) -> Data:
    rng = np.random.default_rng(5)

    def integers(like: Any) -> Any:
        return rng.integers(-4, 5, like.shape).astype(like.dtype)

    return replace(data, x=integers(data.x), rows=integers(data.rows))


def gradients(
    group: jax_ep.Group,
    backend: str,
    *,
    layout: str,
    dtype: str,
    check_vma: bool,
    outside: bool,
) -> None:
    """Compares gradients of x and the weights through both operations, in or around shard_map."""
    alignment = 4 if layout == "expert" else 1
    case = make_case(
        group, layout=layout, dtype=dtype, expert_alignment=alignment, capacity="short"
    )
    data = make_data(case, "skewed", seed_of("skewed"))
    plan = plan_of(case, data.topk_idx)
    assert plan.num_dropped.sum() > 0
    scale = _normal(data.x.shape, seed=2)

    def loss(x: Any, weights: Any, topk_idx: Any, scale: Any) -> Any:
        out = dispatch(case, group, backend, x, topk_idx, weights)
        back = partial(_combine, out.handle, backend)
        return _loss(layout, out.x, out.weights, back, scale)

    def reference_loss(x: Any, weights: Any) -> Any:
        sent = reference.dispatch(plan, x), reference.dispatch_weights(plan, weights)
        return _loss(layout, *sent, partial(expected_sums, case, plan), scale)

    operands = (data.x, data.topk_weights, data.topk_idx, scale)
    got = _grad(loss, (0, 1), group, operands, check_vma=check_vma, outside=outside)
    _assert_close(case, got, _reference_grad(reference_loss, operands[:2]))


def _loss(layout: str, rows: Any, weights: Any, back: Callable[..., Any], scale: Any) -> jax.Array:
    """Computes a loss that is nonlinear between the operations and behind them."""
    made = jnp.sin(rows.astype(jnp.float32)).astype(rows.dtype)
    if layout == "rank":
        made = (made.astype(jnp.float32) * weights.sum(-1, keepdims=True)).astype(rows.dtype)
        weights = None
    return jnp.sum(jnp.cos(back(made, weights).astype(jnp.float32)) * scale)


def _combine(handle: jax_ep.DispatchHandle, backend: str, rows: Any, weights: Any) -> jax.Array:
    return jax_ep.combine(rows, handle, weights=weights, backend=backend)


def gradients_of_combine(
    group: jax_ep.Group, backend: str, *, layout: str, weights_at: str | None
) -> None:
    """Compares gradients of rows, weights in both forms, and biases; unused rows hold NaN."""
    alignment = 2 if layout == "expert" else 1
    case = make_case(group, layout=layout, dtype="f32", expert_alignment=alignment, capacity="half")
    data = make_data(case, "skewed", seed_of("skewed"))
    data.topk_idx[:, ::5] = -1
    plan = plan_of(case, data.topk_idx)
    assert plan.num_dropped.sum() > 0
    weights = {
        None: None,
        "rows": reference.dispatch_weights(plan, data.topk_weights),
        "tokens": data.topk_weights,
    }[weights_at]
    rows = data.rows.copy()
    rows[plan.recv_src < 0] = np.nan
    bias, scale = _normal(data.x.shape, seed=4), _normal(data.x.shape, seed=3)

    def loss(rows: Any, bias: Any, weights: Any, fixed: Any) -> Any:
        x, topk_idx, scale = fixed
        out = dispatch(case, group, backend, x, topk_idx)
        y = jax_ep.combine(rows, out.handle, weights=weights, bias=bias, backend=backend)
        return jnp.sum(jnp.sin(y) * scale)

    def reference_loss(rows: Any, bias: Any, weights: Any) -> Any:
        at_rows = weights
        if weights_at == "tokens":
            at_rows = reference.dispatch_weights(plan, weights)
        return jnp.sum(jnp.sin(expected_sums(case, plan, rows, at_rows, (bias,))) * scale)

    operands = (rows, bias, weights, (data.x, data.topk_idx, scale))
    got = _grad(loss, (0, 1, 2), group, operands, check_vma=True, outside=True)
    _assert_close(case, got, _reference_grad(reference_loss, (data.rows, bias, weights)))


def gradients_along_a_handle(group: jax_ep.Group, backend: str, *, layout: str) -> None:
    """Compares gradients of rows that travel along the handle of an earlier dispatch."""
    case = make_case(group, layout=layout, dtype="f32", capacity="half")
    data, other = make_data(case, "masked"), make_data(case, "masked", seed=1)
    plan = plan_of(case, data.topk_idx)

    def loss(x2: Any, x: Any, ids: Any) -> Any:
        handle = dispatch(case, group, backend, x, ids).handle
        return jnp.sum(jnp.sin(jax_ep.dispatch(x2, handle=handle, backend=backend).x))

    def reference_loss(x2: Any) -> Any:
        return jnp.sum(jnp.sin(reference.dispatch(plan, x2)))

    operands = (other.x, data.x, data.topk_idx)
    got = _grad(loss, (0,), group, operands, check_vma=True, outside=False)
    _assert_close(case, got, _reference_grad(reference_loss, (other.x,)))


def gradients_through_layers(
    group: jax_ep.Group, backend: str, *, layout: str, check_vma: bool
) -> None:
    """Compares gradients of layers under scan and checkpoint, each with its own routing."""
    case = make_case(group, layout=layout, dtype="f32", capacity="short")
    layers = [make_data(case, r) for r in ("balanced", "skewed", "masked")]
    ids = np.stack([data.topk_idx for data in layers], axis=1)
    x, weights = layers[0].x, layers[0].topk_weights

    def loss(x: Any, weights: Any, ids: Any) -> Any:
        def layer(h: Any, ids: Any) -> Any:
            out = dispatch(case, group, backend, h, ids, weights)
            w = None if layout == "rank" else out.weights
            y = jax_ep.combine(jnp.tanh(out.x), out.handle, weights=w, backend=backend)
            return h + y * 0.3, None

        return jnp.sum(jnp.sin(jax.lax.scan(jax.checkpoint(layer), x, ids)[0]))

    def reference_loss(h: Any, weights: Any) -> Any:
        for data in layers:
            plan = plan_of(case, data.topk_idx)
            w = None if layout == "rank" else reference.dispatch_weights(plan, weights)
            rows = jnp.tanh(reference.dispatch(plan, h))
            h = h + expected_sums(case, plan, rows, w) * 0.3
        return jnp.sum(jnp.sin(h))

    got = _grad(loss, (0, 1), group, (x, weights, ids), check_vma=check_vma, outside=False)
    _assert_close(case, got, _reference_grad(reference_loss, (x, weights)))


def _grad(
    loss: Callable[..., Any],
    argnums: tuple[int, ...],
    group: jax_ep.Group,
    operands: tuple[Any, ...],
    *,
    check_vma: bool,
    outside: bool,
) -> Any:
    """Computes gradients [R, ...] of a rank's loss, summed over the ranks."""
    if not outside:
        return on_group(jax.grad(loss, argnums), group, check_vma=check_vma)(*operands)
    losses = on_ranks(loss, group.mesh, axes=group.axes, check_vma=check_vma)
    total = jax.jit(jax.grad(lambda *a: losses(*a).sum(), argnums))
    return total(*place(operands, group.mesh, group.axes))


def _reference_grad(loss: Callable[..., Any], operands: tuple[Any, ...]) -> Any:
    """Computes gradients on the host, where every process has the arrays of all ranks."""
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        argnums = tuple(range(len(operands)))
        return jax.jit(jax.grad(loss, argnums))(*jax.tree.map(jnp.asarray, operands))


def _assert_close(case: Case, got: Any, expected: Any) -> None:
    leaves = jax.tree.leaves(got), jax.tree.leaves(expected)
    for number, (a, b) in enumerate(zip(*leaves, strict=True)):
        assert_close(a, b, tolerance=_TOLERANCES[case.dtype], what=f"gradient {number}")


def _normal(shape: tuple[int, ...], seed: int) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


_WEIGHTS_AT = [("rank", None), ("expert", None), ("expert", "rows"), ("expert", "tokens")]
_LINEAR = tuple(
    Check(
        combine_is_the_transpose_of_dispatch, ROUND_TRIP, {"layout": layout, "capacity": capacity}
    )
    for layout in LAYOUTS
    for capacity in ("ample", "short", "half")
)
_OTHERS = (
    *(
        Check(gradients_of_combine, ROUND_TRIP, {"layout": layout, "weights_at": weights_at})
        for layout, weights_at in _WEIGHTS_AT
    ),
    *(Check(gradients_along_a_handle, ROUND_TRIP, {"layout": layout}) for layout in LAYOUTS),
    *(
        Check(gradients_through_layers, ROUND_TRIP, {"layout": layout, "check_vma": check_vma})
        for layout in LAYOUTS
        for check_vma in (True, False)
    ),
)


def _gradients(*dtypes: str) -> list[Check]:
    return [
        Check(
            gradients,
            ROUND_TRIP,
            {"layout": layout, "dtype": dtype, "check_vma": check_vma, "outside": outside},
        )
        for layout in LAYOUTS
        for dtype in dtypes
        for check_vma in (True, False)
        for outside in (True, False)
    ]


CHECKS = (*_LINEAR, *_gradients("f32", "bf16"), *_OTHERS)
FULL = (*CHECKS, *_gradients("f16"))
