"""Gradients: adjointness, and values against jax.grad of the reference."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Case, dispatch, make_data, plan_of, round_trip
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import jax_ep
from jax_ep import reference
from jax_ep.testing.compare import assert_same_bits
from jax_ep.testing.ranks import on_ranks

ROUTINGS = ("balanced", "skewed", "masked", "all_empty", "invalid_ids")


def _integers(rng, shape, dtype=jnp.float32):
    """Small integers: every product and sum is exact, so sums in any order are equal."""
    return rng.integers(-4, 5, shape).astype(np.float32).astype(dtype)


@pytest.mark.parametrize("recv_capacity", [None, 11])
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("num_ranks", [1, 3, 8])
def test_combine_is_the_transpose_of_dispatch(
    groups, num_ranks, layout, backend, routing, recv_capacity
):
    """<dispatch(x), y> == <x, combine(y)>, exactly, on integers."""
    case = Case(num_ranks, layout, dtype=jnp.float32, recv_capacity=recv_capacity)
    data = make_data(case, routing)
    rng = np.random.default_rng(5)
    data = dataclasses.replace(
        data, x=_integers(rng, data.x.shape), rows=_integers(rng, data.rows.shape)
    )
    fn = round_trip(case, groups(num_ranks), backend)
    out, y = fn(data.x, data.topk_idx, data.topk_weights, data.rows, ())
    left = np.vdot(np.asarray(out.x, np.float64), np.asarray(data.rows, np.float64))
    right = np.vdot(np.asarray(data.x, np.float64), np.asarray(y, np.float64))
    assert left == right
    assert routing == "all_empty" or left != 0


def _moe_loss(dispatch_fn, combine_fn, scale, x, weights):
    """A loss through both operations and something nonlinear between and behind them."""
    rows, row_weights = dispatch_fn(x, weights)
    made = jnp.sin(rows.astype(jnp.float32)).astype(rows.dtype)
    if row_weights is not None and row_weights.ndim == rows.ndim:  # rank layout: [.., C, K]
        made = (made.astype(jnp.float32) * row_weights.sum(-1, keepdims=True)).astype(rows.dtype)
        y = combine_fn(made, None)
    else:
        y = combine_fn(made, row_weights)
    return jnp.sum(jnp.cos(y.astype(jnp.float32)) * scale)


def _reference_grads(case, data, scale):
    plan = plan_of(case, data)
    loss = partial(
        _moe_loss,
        lambda x, w: (reference.dispatch(plan, x), reference.dispatch_weights(plan, w)),
        partial(reference.combine, plan),
        scale,
    )
    return jax.grad(loss, argnums=(0, 1))(jnp.asarray(data.x), jnp.asarray(data.topk_weights))


def _assert_close(case, got, expected):
    tolerance = {jnp.float32: 1e-5, jnp.bfloat16: 3e-2}[case.dtype]
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype
        scale = max(1.0, float(np.abs(np.asarray(b, np.float32)).max()))
        np.testing.assert_allclose(
            np.asarray(a, np.float32), np.asarray(b, np.float32), atol=tolerance * scale
        )


@pytest.mark.parametrize("outside", [True, False], ids=["grad_outside", "grad_inside"])
@pytest.mark.parametrize("check_vma", [True, False], ids=["vma", "no_vma"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=lambda d: d.__name__)
def test_gradients_match_reference(groups, layout, backend, dtype, check_vma, outside):
    group = groups(4)
    alignment = 4 if layout == "expert" else 1
    case = Case(4, layout, dtype=dtype, expert_alignment=alignment, recv_capacity=40)
    data = make_data(case, "skewed")
    scale = np.random.default_rng(2).standard_normal(data.x.shape).astype(np.float32)
    assert plan_of(case, data).num_dropped.sum() > 0

    def loss(x, weights, topk_idx, scale):
        handle = []

        def send(x, weights):
            out = dispatch(case, group, backend, x, topk_idx, weights)
            handle.append(out.handle)
            return out.x, out.weights

        def back(rows, weights):
            return jax_ep.combine(rows, handle[0], weights=weights, backend=backend)

        return _moe_loss(send, back, scale, x, weights)

    if outside:
        losses = on_ranks(loss, group.mesh, check_vma=check_vma)
        grads = jax.grad(lambda x, w: losses(x, w, data.topk_idx, scale).sum(), argnums=(0, 1))(
            data.x, data.topk_weights
        )
    else:
        grad = on_ranks(jax.grad(loss, argnums=(0, 1)), group.mesh, check_vma=check_vma)
        grads = grad(data.x, data.topk_weights, data.topk_idx, scale)
    _assert_close(case, grads, _reference_grads(case, data, scale))


@pytest.mark.parametrize("weights_at", ["rows", "tokens"])
def test_gradients_of_combine(groups, backend, weights_at):
    """Of rows, weights in both forms, and biases; unused rows may hold NaN."""
    group = groups(3)
    case = Case(3, "expert", dtype=jnp.float32, recv_capacity=20, expert_alignment=2)
    data = make_data(case, "masked")
    plan = plan_of(case, data)
    assert plan.num_dropped.sum() > 0
    scale = np.random.default_rng(3).standard_normal(data.x.shape).astype(np.float32)
    bias = np.random.default_rng(4).standard_normal(data.x.shape).astype(np.float32)
    at_rows = reference.dispatch_weights(plan, data.topk_weights)
    weights = at_rows if weights_at == "rows" else data.topk_weights

    def loss(rows, weights, bias, topk_idx, x, scale):
        out = dispatch(case, group, backend, x, topk_idx)
        y = jax_ep.combine(rows, out.handle, weights=weights, bias=bias, backend=backend)
        return jnp.sum(jnp.sin(y) * scale)

    def reference_loss(rows, weights, bias):
        w = weights if weights_at == "rows" else reference.dispatch_weights(plan, weights)
        return jnp.sum(jnp.sin(reference.combine(plan, rows, w, (bias,))) * scale)

    losses = on_ranks(loss, group.mesh)
    rows = data.rows.copy()
    rows[plan.recv_src < 0] = np.nan
    grads = jax.grad(lambda *a: losses(*a, data.topk_idx, data.x, scale).sum(), argnums=(0, 1, 2))(
        rows, weights, bias
    )
    expected = jax.grad(reference_loss, argnums=(0, 1, 2))(
        *(jnp.asarray(a) for a in (data.rows, weights, bias))
    )
    _assert_close(case, grads, expected)


@pytest.mark.parametrize("check_vma", [True, False], ids=["vma", "no_vma"])
def test_scan_and_checkpoint(groups, layout, backend, check_vma):
    """Layers under scan and remat have the gradients of the same layers written out."""
    group = groups(8)
    case = Case(8, layout, dtype=jnp.float32, num_tokens=6)
    data = make_data(case, "balanced")

    def layer(h, topk_idx, weights):
        out = dispatch(case, group, backend, h, topk_idx, weights)
        made = jnp.tanh(out.x)
        w = None if layout == "rank" else out.weights
        return h + jax_ep.combine(made, out.handle, weights=w, backend=backend) * 0.3

    def scanned(x, weights, topk_idx):
        def body(h, shift):
            return layer(h, (topk_idx + shift) % case.num_experts, weights), None

        h, _ = jax.lax.scan(jax.checkpoint(body), x, jnp.arange(3))
        return jnp.sum(jnp.sin(h))

    def written_out(x, weights, topk_idx):
        for shift in range(3):
            x = layer(x, (topk_idx + shift) % case.num_experts, weights)
        return jnp.sum(jnp.sin(x))

    args = (data.x, data.topk_weights, np.maximum(data.topk_idx, 0))
    grads = [
        on_ranks(jax.grad(f, argnums=(0, 1)), group.mesh, check_vma=check_vma)(*args)
        for f in (scanned, written_out)
    ]
    _assert_close(case, grads[0], grads[1])


def test_replicated_operands_under_check_vma(groups, backend):
    """Operands that are equal on all ranks: cast to varying, and their gradient is the sum."""
    group = groups(4)
    x = np.random.default_rng(0).standard_normal((6, 8)).astype(np.float32)
    ids = np.arange(6, dtype=np.int32)[:, None] % 4

    def loss(x, ids):
        out = jax_ep.dispatch(x, ids, group=group, num_experts=4, backend=backend)
        return jax.lax.psum(jnp.sum(jax_ep.combine(out.x, out.handle, backend=backend) ** 2), "ep")

    sharded = jax.jit(jax.shard_map(loss, mesh=group.mesh, in_specs=P(), out_specs=P()))
    assert sharded(x, ids) == pytest.approx(4 * np.sum(x**2), rel=1e-5)
    grad = jax.grad(lambda x: sharded(x, ids))(x)
    np.testing.assert_allclose(grad, 8 * x, rtol=1e-5)


def test_results_vary_over_the_group_and_the_operands_only(backend):
    """Along an axis over which the operands are equal, the results are too, and JAX knows it."""
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "ep"))
    with jax_ep.Group.open(mesh, "ep") as group:

        def fn(x, ids):
            out = jax_ep.dispatch(x, ids, group=group, num_experts=4, backend=backend)
            return jax_ep.combine(out.x, out.handle, backend=backend)

        fn = jax.jit(jax.shard_map(fn, mesh=mesh, in_specs=P("ep"), out_specs=P("ep")))
        x = np.arange(8 * 8, dtype=np.float32).reshape(8, 8)
        ids = np.arange(8, dtype=np.int32)[:, None] % 4
        assert_same_bits(fn(x, ids), x)


def test_unsupported_transforms_are_refused_by_name(groups, backend):
    group = groups(2)
    x, ids = np.ones((2, 4, 8), np.float32), np.zeros((2, 4, 1), np.int32)

    def fn(x, ids):
        return jax_ep.dispatch(x, ids, group=group, num_experts=2, backend=backend).x

    def back(rows, ids):
        out = jax_ep.dispatch(jnp.ones((4, 8)), ids, group=group, num_experts=2, backend=backend)
        return jax_ep.combine(rows, out.handle, backend=backend)

    over_x = on_ranks(jax.vmap(fn, in_axes=(0, None)), group.mesh)
    over_ids = on_ranks(jax.vmap(fn, in_axes=(None, 0)), group.mesh)
    with pytest.raises(jax_ep.ConfigError, match=r"dispatch: jax\.vmap is not supported"):
        over_x(np.ones((2, 3, 4, 8), np.float32), ids)
    with pytest.raises(jax_ep.ConfigError, match=r"dispatch: jax\.vmap is not supported"):
        over_ids(x, np.zeros((2, 3, 4, 1), np.int32))
    with pytest.raises(jax_ep.ConfigError, match=r"combine: jax\.vmap is not supported"):
        on_ranks(jax.vmap(back, in_axes=(0, None)), group.mesh)(
            np.ones((2, 3, 8, 8), np.float32), ids
        )
    with pytest.raises(jax_ep.ConfigError, match="only first derivatives"):
        on_ranks(jax.hessian(lambda x, i: jnp.sum(fn(x, i) ** 2)), group.mesh)(x, ids)
