"""fp8 rounding, and what a dispatch of fp8 pairs, payloads, or along a handle refuses.

Values of those that travel are in the conformance suite.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_ep
from jax_ep.fp8 import FP8_DTYPES
from jax_ep.testing.ranks import on_ranks


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


def test_no_rows_are_rows():
    rounded, scales = jax_ep.quantize_fp8(jnp.ones((0, 256)))
    assert (rounded.shape, scales.shape) == ((0, 256), (0, 2))
    assert jax_ep.dequantize_fp8(rounded, scales).shape == (0, 256)


def test_gradient_of_scales():
    x, scales = jax_ep.quantize_fp8(jnp.arange(512.0).reshape(2, 256))
    grad = jax.grad(lambda s: jnp.sum(jax_ep.dequantize_fp8(x, s, jnp.float32)))(scales)
    np.testing.assert_allclose(grad, np.asarray(x, np.float32).reshape(2, 2, 128).sum(-1))


ONES = np.ones((2, 128), np.float32)
QUANTIZE = {
    "list": (([[1.0] * 128],), {}, jax_ep.DTypeError, "x must be an array, got list"),
    "int32": ((ONES.astype(np.int32),), {}, jax_ep.DTypeError, "x must be bfloat16, float16, float32, got int32"),
    "float64": ((ONES.astype(np.float64),), {}, jax_ep.DTypeError, "x must be bfloat16, float16, float32, got float64"),
    "rank": ((ONES[0],), {}, jax_ep.ShapeError, "x must be [num_tokens, hidden], hidden a positive multiple of block=128, got shape (128,)"),
    "hidden": ((ONES[:, :100],), {}, jax_ep.ShapeError, "x must be [num_tokens, hidden], hidden a positive multiple of block=128, got shape (2, 100)"),
    "no_hidden": ((ONES[:, :0],), {}, jax_ep.ShapeError, "x must be [num_tokens, hidden], hidden a positive multiple of block=128, got shape (2, 0)"),
    "block_none": ((ONES,), {"block": None}, jax_ep.ConfigError, "block must be a static integer, got None"),
    "block_zero": ((ONES,), {"block": 0}, jax_ep.ConfigError, "block must be at least 1, got 0"),
    "scales": ((ONES,), {"scales": "f16"}, jax_ep.ConfigError, "scales must be one of 'f32', 'e8m0', got 'f16'"),
    "dtype": ((ONES,), {"dtype": jnp.float32}, jax_ep.DTypeError, "dtype must be float8_e4m3fn, float8_e5m2, got "),
    "dtype_text": ((ONES,), {"dtype": "fp8"}, jax_ep.DTypeError, "dtype must be float8_e4m3fn, float8_e5m2, got 'fp8'"),
}  # fmt: skip


@pytest.mark.parametrize("name", QUANTIZE)
def test_quantize_fp8_bad_input(name):
    args, options, error, message = QUANTIZE[name]
    with pytest.raises(error, match=re.escape(f"quantize_fp8: {message}")):
        jax_ep.quantize_fp8(*args, **options)


ROWS, SCALES = ONES.astype(FP8_DTYPES[0]), np.ones((2, 2), np.float32)
DEQUANTIZE = {
    "list": ((ROWS, [[1.0, 1.0]] * 2), jax_ep.DTypeError, "scales must be an array, got list"),
    "bf16": ((ROWS, SCALES.astype(jnp.bfloat16)), jax_ep.DTypeError, "scales must be float32, uint8, got bfloat16"),
    "f16": ((ROWS, SCALES.astype(np.float16)), jax_ep.DTypeError, "scales must be float32, uint8, got float16"),
    "rows": ((ROWS, SCALES[:1]), jax_ep.ShapeError, "scales must be [rows=2, a divisor of hidden=128], got shape (1, 2)"),
    "more_rows": ((ROWS, np.ones((4, 1), np.float32)), jax_ep.ShapeError, "scales must be [rows=2, a divisor of hidden=128], got shape (4, 1)"),
    "blocks": ((ROWS, np.ones((2, 3), np.float32)), jax_ep.ShapeError, "scales must be [rows=2, a divisor of hidden=128], got shape (2, 3)"),
    "no_blocks": ((ROWS, SCALES[:, :0]), jax_ep.ShapeError, "scales must be [rows=2, a divisor of hidden=128], got shape (2, 0)"),
    "one_axis": ((ROWS, SCALES[:, 0]), jax_ep.ShapeError, "scales must be [rows=2, a divisor of hidden=128], got shape (2,)"),
    "x_dtype": ((ONES, SCALES), jax_ep.DTypeError, "x must be float8_e4m3fn, float8_e5m2, got float32"),
    "x_rank": ((ROWS[None], SCALES), jax_ep.ShapeError, "x must be [rows, hidden], hidden positive, got shape (1, 2, 128)"),
    "dtype": ((ROWS, SCALES, jnp.int32), jax_ep.DTypeError, "dtype must be bfloat16, float16, float32, got "),
}  # fmt: skip


@pytest.mark.parametrize("name", DEQUANTIZE)
def test_dequantize_fp8_bad_input(name):
    args, error, message = DEQUANTIZE[name]
    with pytest.raises(error, match=re.escape(f"dequantize_fp8: {message}")):
        jax_ep.dequantize_fp8(*args)


DISPATCH_FP8 = {
    "hidden": (100, {}, jax_ep.ShapeError, "x must be [num_tokens, hidden], hidden a positive multiple of block=128, got shape (4, 100)"),
    "fp8_bytes": (24, {"block": 8}, jax_ep.ShapeError, "hidden must be a multiple of 16, got 24"),
    "block_none": (128, {"block": None}, jax_ep.ConfigError, "block must be a static integer, got None"),
    "block_zero": (128, {"block": 0}, jax_ep.ConfigError, "block must be at least 1, got 0"),
    "scales": (128, {"scales": "f16"}, jax_ep.ConfigError, "scales must be one of 'f32', 'e8m0', got 'f16'"),
}  # fmt: skip


@pytest.mark.parametrize("name", DISPATCH_FP8)
def test_dispatch_fp8_bad_input(groups, name):
    """The errors of quantize_fp8, under its own name."""
    hidden, options, error, message = DISPATCH_FP8[name]
    group = groups(2)

    def fn(x, ids):
        return jax_ep.dispatch_fp8(x, ids, group=group, num_experts=2, **options).x

    with pytest.raises(error, match=re.escape(f"dispatch_fp8: {message}")):
        on_ranks(fn, group.mesh)(np.ones((2, 4, hidden), np.float32), np.zeros((2, 4, 1), np.int32))


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
    "fill_and_handle": (lambda x, ids, h: jax_ep.dispatch(x, handle=h, fill="none"), jax_ep.ConfigError, r"dispatch: with handle= the routing is known, got also fill"),
    "tokens": (lambda x, ids, h: jax_ep.dispatch(x[:3], handle=h), jax_ep.ShapeError, r"dispatch: x must have shape \(4, 128\), got \(3, 128\)"),
    "not_a_handle": (lambda x, ids, h: jax_ep.dispatch(x, handle=ids), jax_ep.ConfigError, "dispatch: handle must be the DispatchHandle of a dispatch, got"),
    "triple": (lambda x, ids, h: jax_ep.dispatch((x, x, x), handle=h), jax_ep.DTypeError, "dispatch: x must be an array or a pair, got 3 arrays"),
    "not_fp8": (lambda x, ids, h: jax_ep.dispatch((x, x), handle=h), jax_ep.DTypeError, r"dispatch: x\[0\] must be float8_e4m3fn, float8_e5m2, got float32"),
    "scales_dtype": (lambda x, ids, h: jax_ep.dispatch((x.astype(FP8_DTYPES[0]), ids), handle=h), jax_ep.DTypeError, "dispatch: scales must be float32, uint8, got int32"),
    "scales_tokens": (lambda x, ids, h: jax_ep.dispatch((x.astype(FP8_DTYPES[0]), x[:2]), handle=h), jax_ep.ShapeError, r"dispatch: scales must be \[num_tokens=4, at least 1\], got shape \(2, 128\)"),
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
