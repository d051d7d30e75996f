"""dispatch along a handle, fp8 pairs, payloads, and combine_weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import ROUTINGS, Case, dispatch, make_data, plan_of

import jax_ep
from jax_ep import reference
from jax_ep.testing.compare import assert_same_bits
from jax_ep.testing.ranks import on_ranks

FP8 = (jnp.float8_e4m3fn, jnp.float8_e5m2)


def _options(case, group, backend):
    return {
        "group": group,
        "num_experts": case.num_experts,
        "layout": case.layout,
        "recv_capacity": case.capacity,
        "expert_alignment": case.expert_alignment,
        "backend": backend,
    }


@pytest.mark.parametrize("recv_capacity", [None, 9])
@pytest.mark.parametrize("routing", ["balanced", "masked", "all_empty"])
def test_other_data_along_a_handle(groups, layout, backend, routing, recv_capacity):
    case = Case(4, layout, recv_capacity=recv_capacity)
    data, other = make_data(case, routing), make_data(case, routing, seed=1)
    group = groups(4)

    def fn(x, ids, x2):
        out = dispatch(case, group, backend, x, ids)
        return out, jax_ep.dispatch(x2, handle=out.handle, backend=backend)

    out, again = on_ranks(fn, group.mesh)(data.x, data.topk_idx, other.x)
    plan = plan_of(case, data)
    assert_same_bits(again.x, reference.dispatch(plan, np.asarray(other.x)))
    assert again.topk_idx is None
    assert again.weights is None
    for name in ("group_sizes", "num_recv", "num_dropped", "num_invalid"):
        assert_same_bits(getattr(again, name), getattr(out, name), what=name)
    for a, b in zip(jax.tree.leaves(again.handle), jax.tree.leaves(out.handle), strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("scale_type", [np.float32, np.uint8], ids=["f32", "e8m0"])
@pytest.mark.parametrize("fp8", FP8, ids=lambda d: d.__name__)
@pytest.mark.parametrize("along", [False, True], ids=["routed", "along"])
def test_fp8_pair_and_payload(groups, layout, backend, fp8, scale_type, along):
    """Every bit pattern of fp8 and of the scales arrives as it was; odd row sizes too."""
    alignment = 4 if layout == "expert" else 1
    case = Case(3, layout, hidden=32, expert_alignment=alignment)
    data = make_data(case, "skewed")
    rng = np.random.default_rng(3)
    x = rng.integers(0, 256, (3, 12, 32), np.uint8).view(fp8)
    scales = rng.integers(0, 256, (3, 12, 3, np.dtype(scale_type).itemsize), np.uint8)
    scales = scales.view(scale_type)[..., 0]
    payload = rng.integers(-1000, 1000, (3, 12, 5)).astype(np.int16)
    group = groups(3)

    def fn(x, scales, payload, ids):
        out = jax_ep.dispatch((x, scales), ids, payload=payload, **_options(case, group, backend))
        if along:
            out = jax_ep.dispatch((x, scales), handle=out.handle, payload=payload, backend=backend)
        return out

    out = on_ranks(fn, group.mesh)(x, scales, payload, data.topk_idx)
    plan = plan_of(case, data)
    for got, sent in ((out.x, x), (out.scales, scales), (out.payload, payload)):
        bits = f"u{sent.dtype.itemsize}"
        expected = reference.dispatch(plan, sent.view(bits))
        assert_same_bits(np.asarray(got).view(bits), expected)
        assert np.asarray(got).dtype == sent.dtype


@pytest.mark.parametrize("routing", ROUTINGS)
def test_combine_weights_brings_weights_back(groups, layout, backend, routing):
    """What was kept comes back as it went; what was dropped, masked or invalid is zero."""
    case = Case(4, layout, recv_capacity=14)
    data = make_data(case, routing)
    group = groups(4)

    def fn(x, ids, weights):
        out = dispatch(case, group, backend, x, ids, weights)
        loss = lambda w: jnp.sum(  # noqa: E731
            jax_ep.combine_weights(w, out.handle, backend=backend) * 3.0
        )
        back = jax_ep.combine_weights(out.weights, out.handle, backend=backend)
        return back, jax.grad(loss)(out.weights)

    back, grad = on_ranks(fn, group.mesh)(data.x, data.topk_idx, data.topk_weights)
    plan = plan_of(case, data)
    rank = np.where(data.topk_idx >= 0, data.topk_idx // case.experts_per_rank, 0)
    is_expert = (data.topk_idx >= 0) & (data.topk_idx < case.num_experts)
    if layout == "rank":
        row = np.take_along_axis(plan.send_row, np.where(is_expert, rank, 0), axis=-1)
    else:
        row = plan.send_row
    expected = np.where(is_expert & (row >= 0), data.topk_weights, 0)
    assert_same_bits(back, expected.astype(np.float32))
    has_token = plan.recv_src >= 0
    if layout == "rank":
        has_token = np.broadcast_to(has_token[..., None], grad.shape)
    assert_same_bits(grad, np.where(has_token, 3.0, 0.0).astype(np.float32))


def test_gradient_along_a_handle(groups, layout, backend):
    case = Case(3, layout, dtype=jnp.float32)
    data, other = make_data(case, "masked"), make_data(case, "masked", seed=1)
    group = groups(3)

    def loss(x2, x, ids):
        handle = dispatch(case, group, backend, x, ids).handle
        return jnp.sum(jnp.sin(jax_ep.dispatch(x2, handle=handle, backend=backend).x))

    grad = on_ranks(jax.grad(loss), group.mesh)(other.x, data.x, data.topk_idx)
    plan = plan_of(case, data)
    expected = jax.grad(lambda x: jnp.sum(jnp.sin(reference.dispatch(plan, x))))(
        jnp.asarray(other.x)
    )
    np.testing.assert_allclose(grad, expected, atol=1e-5)


@pytest.mark.parametrize("scales", ["f32", "e8m0"])
def test_quantize_fp8(scales):
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((7, 256)) * np.exp(rng.normal(0, 5, (7, 1)))).astype(np.float32)
    x[3, :128] = 0
    rounded, stored = jax_ep.quantize_fp8(jnp.asarray(x), scales=scales)
    assert rounded.shape == x.shape
    assert stored.shape == (7, 2)
    assert stored.dtype == (jnp.float32 if scales == "f32" else jnp.uint8)
    back = np.asarray(jax_ep.dequantize_fp8(rounded, stored, jnp.float32))
    largest = np.abs(x.reshape(7, 2, 128)).max(-1).repeat(128, axis=1)
    # Half a unit of three mantissa bits; below the normal range a fixed step of the block's scale.
    step = 2.0 if scales == "e8m0" else 1.0
    assert np.all(
        np.abs(back - x) <= np.maximum(np.abs(x) / 16, step * largest / 448 / 1024 * 1.01)
    )
    assert not back[3, :128].any()
    if scales == "e8m0":
        exact = np.exp2(np.asarray(stored).astype(np.float32) - 127)
        assert np.all(exact * 448 >= largest.reshape(7, 2, 128)[:, :, 0])
        assert np.all(
            (exact / 2 * 448 < largest.reshape(7, 2, 128)[:, :, 0]) | (largest == 0)[:, ::128]
        )


def test_quantize_fp8_bad_input():
    with pytest.raises(jax_ep.ShapeError, match=r"quantize_fp8: .* block=128, got shape"):
        jax_ep.quantize_fp8(jnp.ones((2, 100)))
    with pytest.raises(jax_ep.ConfigError, match="scales must be one of 'f32', 'e8m0', got 'f16'"):
        jax_ep.quantize_fp8(jnp.ones((2, 128)), scales="f16")
    with pytest.raises(jax_ep.DTypeError, match="dtype must be float8_e4m3fn or float8_e5m2"):
        jax_ep.quantize_fp8(jnp.ones((2, 128)), dtype=jnp.float32)


@pytest.mark.parametrize("scales", ["f32", "e8m0"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=lambda d: d.__name__)
def test_dispatch_fp8(groups, layout, backend, scales, dtype):
    """Values: those of quantise and dequantise around a dispatch. Gradient: that of dispatch."""
    case = Case(4, layout, hidden=256, dtype=dtype)
    data = make_data(case, "balanced")
    group = groups(4)
    cotangent = np.random.default_rng(5).standard_normal((4, case.capacity, 256)).astype(dtype)

    def fn(x, weights, ids, ct):
        def through_fp8(x, weights):
            out = jax_ep.dispatch_fp8(
                x, ids, weights, scales=scales, **_options(case, group, backend)
            )
            return out.x, out.weights

        def plain(x, weights):
            out = dispatch(case, group, backend, x, ids, weights)
            return out.x, out.weights

        (y, w), vjp = jax.vjp(through_fp8, x, weights)
        return y, vjp((ct, w)), jax.vjp(plain, x, weights)[1]((ct, w))

    y, grads, plain = on_ranks(fn, group.mesh)(data.x, data.topk_weights, data.topk_idx, cotangent)
    plan = plan_of(case, data)
    rounded = [
        jax_ep.dequantize_fp8(*jax_ep.quantize_fp8(jnp.asarray(x), scales=scales), dtype)
        for x in data.x
    ]
    assert_same_bits(y, reference.dispatch(plan, np.stack([np.asarray(r) for r in rounded])))
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(plain), strict=True):
        assert_same_bits(a, b)


def test_what_cannot_be_differentiated_is_refused_by_name(groups):
    group = groups(2)
    x, ids = np.ones((2, 4, 128), np.float32), np.zeros((2, 4, 1), np.int32)

    def grad_of(send):
        return on_ranks(jax.grad(lambda x, i: jnp.sum(send(x, i).astype(jnp.float32))), group.mesh)

    def fp8(x, ids):
        pair = jax_ep.quantize_fp8(x)
        return jax_ep.dispatch(pair, ids, group=group, num_experts=2).x

    def payload(x, ids):
        still = jax.lax.stop_gradient(x)
        return jax_ep.dispatch(still, ids, group=group, num_experts=2, payload=x).payload

    def stopped(x, ids):
        pair = jax.lax.stop_gradient(jax_ep.quantize_fp8(x))
        out = jax_ep.dispatch(pair, ids, group=group, num_experts=2)
        return jax_ep.dequantize_fp8(out.x, out.scales, jnp.float32) + x.sum()

    with pytest.raises(jax_ep.ConfigError, match=r"dispatch: fp8 rows cannot be differentiated"):
        grad_of(fp8)(x, ids)
    with pytest.raises(jax_ep.ConfigError, match="dispatch: payload cannot be differentiated"):
        grad_of(payload)(x, ids)
    assert np.all(np.asarray(grad_of(stopped)(x, ids)) == 8 * 128)


BAD = {
    "routing_and_handle": (lambda x, ids, h: jax_ep.dispatch(x, ids, handle=h), jax_ep.ConfigError, r"dispatch: with handle= the routing is known, got also topk_idx"),
    "tokens": (lambda x, ids, h: jax_ep.dispatch(x[:3], handle=h), jax_ep.ShapeError, r"dispatch: x must have shape \(4, 128\), got \(3, 128\)"),
    "not_a_handle": (lambda x, ids, h: jax_ep.dispatch(x, handle=ids), jax_ep.ConfigError, "dispatch: handle must be the DispatchHandle of a dispatch, got"),
    "triple": (lambda x, ids, h: jax_ep.dispatch((x, x, x), handle=h), jax_ep.DTypeError, "dispatch: x must be an array or a pair, got 3 arrays"),
    "not_fp8": (lambda x, ids, h: jax_ep.dispatch((x, x), handle=h), jax_ep.DTypeError, r"dispatch: x\[0\] must be float8_e4m3fn, float8_e5m2, got float32"),
    "scales_dtype": (lambda x, ids, h: jax_ep.dispatch((x.astype(FP8[0]), ids), handle=h), jax_ep.DTypeError, "dispatch: scales must be float32, uint8, got int32"),
    "scales_tokens": (lambda x, ids, h: jax_ep.dispatch((x.astype(FP8[0]), x[:2]), handle=h), jax_ep.ShapeError, r"dispatch: scales must be \[num_tokens=4, at least 1\], got shape \(2, 128\)"),
    "payload_rank": (lambda x, ids, h: jax_ep.dispatch(x, handle=h, payload=x[0]), jax_ep.ShapeError, r"dispatch: payload must be \[num_tokens=4, at least 1\], got shape \(128,\)"),
    "payload_int4": (lambda x, ids, h: jax_ep.dispatch(x, handle=h, payload=x.astype(jnp.int4)), jax_ep.DTypeError, "rows of payload must be whole bytes; pack int4 into uint8"),
    "weights_shape": (lambda x, ids, h: jax_ep.combine_weights(x[:3], h), jax_ep.ShapeError, r"combine_weights: w must be \[recv_capacity=8, num_topk\]"),
    "block": (lambda x, ids, h: jax_ep.dispatch_fp8(x, ids, group=h, num_experts=2), jax_ep.GroupError, "dispatch_fp8: group must be a jax_ep.Group, got DispatchHandle"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(groups, name):
    call, error, message = BAD[name]
    group = groups(2)

    def fn(x, ids):
        handle = jax_ep.dispatch(x, ids, group=group, num_experts=2).handle
        call(x, ids, handle)

    with pytest.raises(error, match=message):
        on_ranks(fn, group.mesh)(np.ones((2, 4, 128), np.float32), np.zeros((2, 4, 1), np.int32))
