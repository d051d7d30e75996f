"""fp8 rounding, and bad input to dispatches of fp8 pairs, of payloads, and along a handle.

The conformance suite checks the values of rows that travel.
"""

import re
from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jax_ep
from jax_ep._src.ops.dispatch.fp8 import FP8_DTYPES
from jax_ep.testing.compare import assert_same_bits
from jax_ep.testing.ranks import on_ranks


@pytest.mark.parametrize("scales", ["f32", "e8m0"])
def test_quantize_fp8_rounds_to_half_a_unit(scales):
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((7, 256)) * np.exp(rng.normal(0, 5, (7, 1)))).astype(np.float32)
    x[3, :128] = 0
    rounded, stored = jax_ep.quantize_fp8(jnp.asarray(x), scales=scales)
    assert rounded.shape == x.shape
    assert stored.shape == (7, 2)
    assert stored.dtype == (jnp.float32 if scales == "f32" else jnp.uint8)
    back = np.asarray(jax_ep.dequantize_fp8(rounded, stored, jnp.float32))
    largest = np.abs(x.reshape(7, 2, 128)).max(-1).repeat(128, axis=1)
    # The error is at most half a unit of three mantissa bits; below the normal range the step is fixed.
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


@pytest.mark.parametrize("fp8", FP8_DTYPES, ids=lambda d: jnp.dtype(d).name)
@pytest.mark.parametrize("scales", ["f32", "e8m0"])
def test_quantize_fp8_has_the_bits_of_numpy(scales, fp8):
    """Scale, product with its inverse, and conversion are NumPy's, alone and in a program."""
    rng = np.random.default_rng(1)
    x = (rng.standard_normal((64, 4096)) * np.exp(rng.normal(0, 5, (64, 4096)))).astype(np.float32)
    x[0] = np.where(rng.random(4096) < 0.5, 1.0, 1.75) * np.exp2(rng.integers(-9, 9, 4096))
    x[1, :128], x[1, 128:256] = 0, np.finfo(np.float32).max
    largest = np.float32(ml_dtypes.finfo(fp8).max)
    blocks = x.reshape(64, 32, 128)
    most = np.abs(blocks).max(-1)
    if scales == "f32":
        stored = np.maximum(most * (np.float32(1) / largest), np.finfo(np.float32).tiny)
        scale = stored
    else:
        exponent = np.ceil(np.log2(np.maximum(most.astype(np.float64) / largest, 2.0**-126)))
        stored = (exponent + 127).astype(np.uint8)
        scale = np.exp2(exponent).astype(np.float32)
    scaled = np.clip(blocks * (np.float32(1) / scale)[..., None], -largest, largest)
    quantize = partial(jax_ep.quantize_fp8, scales=scales, dtype=fp8)
    for call in (quantize, jax.jit(quantize)):
        got, got_scales = call(x)
        assert_same_bits(got_scales, stored)
        assert_same_bits(got, scaled.astype(fp8).reshape(x.shape))


@pytest.mark.parametrize("scales", ["f32", "e8m0"])
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 5, 127])
def test_a_block_that_is_not_finite_arrives_as_nan(scales, value, place):
    """The whole block is NaN, and no other, in a wide array, whose maxima XLA:CPU vectorises."""
    x = np.random.default_rng(2).standard_normal((64, 4096)).astype(np.float32)
    x[3, 256 + place] = value
    expected = np.zeros(x.shape, bool)
    expected[3, 256:384] = True
    quantize = partial(jax_ep.quantize_fp8, scales=scales)
    for call in (quantize, jax.jit(quantize)):
        rows, stored = call(x)
        scale = np.asarray(stored)[3, 2]
        assert scale == 255 if scales == "e8m0" else not np.isfinite(scale)
        back = np.asarray(jax_ep.dequantize_fp8(rows, stored, jnp.float32))
        np.testing.assert_array_equal(np.isnan(back), expected)


def test_dequantize_fp8_takes_every_e8m0_scale():
    """Scales come as bytes or as a dtype. 0 is 2**-127, a subnormal of f32, and 255 is NaN."""
    byte = np.arange(256, dtype=np.uint8)[:, None]
    x = np.broadcast_to(np.array([448, -1.75, 2.0**-9, 0], np.float32), (256, 4))
    wide = x * np.exp2(byte.astype(np.float64) - 127)
    wide[255] = np.nan
    with np.errstate(over="ignore"):
        expected = wide.astype(np.float32)
    # XLA:CPU may flush subnormals, so they are not compared.
    is_exact = ~(np.abs(wide) < np.finfo(np.float32).tiny) | (x == 0)
    fp8 = x.astype(FP8_DTYPES[0])
    results = [
        np.asarray(jax_ep.dequantize_fp8(fp8, scales, jnp.float32))
        for scales in (byte, byte.view(jnp.float8_e8m0fnu))
    ]
    for got in results:
        assert_same_bits(got, expected, where=is_exact)


def _dropped(compiled):
    """Finds conversions to f32 in optimised HLO whose operand is a conversion to a narrower type.

    Conversions around a gather of bf16 are XLA's own, and round nothing. They do not count.
    """
    text = compiled.as_text()
    pattern = r"(%[\w.-]+) = (?:f8\w+|bf16|f16)\[[^\n]*? convert\([^\n]*convert_element_type"
    narrow = re.findall(pattern, text)
    widened = re.findall(r"= f32\[[^\n]*? convert\((?:[^\n%]* )?(%[\w.-]+)\)", text)
    return set(narrow) & set(widened)


@pytest.mark.parametrize("fp8", FP8_DTYPES, ids=lambda d: jnp.dtype(d).name)
@pytest.mark.parametrize("scales", ["f32", "e8m0"])
def test_fp8_conversions_never_meet_in_optimised_hlo(scales, fp8):
    """XLA:GPU drops a rounding whose result is widened, so the two conversions must not meet."""

    def plain(x):
        return (x * 3).astype(fp8).astype(jnp.float32)

    def round_trip(x):
        pair = jax_ep.quantize_fp8(x, scales=scales, dtype=fp8)
        return jax_ep.dequantize_fp8(*pair, jnp.float32)

    x = np.random.default_rng(3).standard_normal((8, 256)).astype(np.float32)
    assert _dropped(jax.jit(plain).lower(x).compile())  # proof that the search finds pairs
    compiled = jax.jit(round_trip).lower(x).compile()
    assert not _dropped(compiled)
    pair = jax.jit(partial(jax_ep.quantize_fp8, scales=scales, dtype=fp8))(x)
    apart = jax.jit(lambda *pair: jax_ep.dequantize_fp8(*pair, jnp.float32))(*pair)
    assert_same_bits(compiled(x), np.asarray(apart))


def test_conversions_never_meet_in_a_sum(groups):
    """With one rank no collective separates the roundings of back end `xla` or dispatch_fp8."""
    group = groups(1)
    options = {"group": group, "backend": "xla"}

    def run(x, ids):
        x = (x * 1.1).astype(jnp.bfloat16)
        layout = {"num_experts": 4, "layout": "expert", "recv_capacity": 16}
        out = jax_ep.dispatch_fp8(x, ids, **layout, **options)
        y = jax_ep.combine(out.x, out.handle, backend="xla")
        total = jax_ep.all_reduce(y, allow_psum=False, **options)
        normed = jax_ep.all_reduce_residual_rmsnorm(
            total, x, jnp.ones(256), algorithm="one_shot", **options
        )
        return [a.astype(jnp.float32) for a in (y, total, *normed)]

    x = np.random.default_rng(4).standard_normal((1, 8, 256)).astype(np.float32)
    ids = np.random.default_rng(5).integers(0, 4, (1, 8, 2)).astype(np.int32)
    lowered = on_ranks(run, group.mesh, check_vma=False).lower(x, ids)
    assert not _dropped(lowered.compile())


def test_empty_arrays_are_quantised():
    rounded, scales = jax_ep.quantize_fp8(jnp.ones((0, 256)))
    assert (rounded.shape, scales.shape) == ((0, 256), (0, 2))
    assert jax_ep.dequantize_fp8(rounded, scales).shape == (0, 256)


def test_scales_have_the_gradient_of_the_product():
    x, scales = jax_ep.quantize_fp8(jnp.arange(512.0).reshape(2, 256))
    grad = jax.grad(lambda s: jnp.sum(jax_ep.dequantize_fp8(x, s, jnp.float32)))(scales)
    np.testing.assert_allclose(grad, np.asarray(x, np.float32).reshape(2, 2, 128).sum(-1))


ONES = np.ones((2, 128), np.float32)
QUANTIZE = {
    "list": (([[1.0] * 128],), {}, jax_ep.DTypeError, "x must be an array, got list"),
    "int32": ((ONES.astype(np.int32),), {}, jax_ep.DTypeError, "x must be bfloat16, float16 or float32, got int32"),
    "float64": ((ONES.astype(np.float64),), {}, jax_ep.DTypeError, "x must be bfloat16, float16 or float32, got float64"),
    "rank": ((ONES[0],), {}, jax_ep.ShapeError, "x must be [num_tokens, hidden] with hidden a positive multiple of block=128, got shape (128,)"),
    "hidden": ((ONES[:, :100],), {}, jax_ep.ShapeError, "x must be [num_tokens, hidden] with hidden a positive multiple of block=128, got shape (2, 100)"),
    "no_hidden": ((ONES[:, :0],), {}, jax_ep.ShapeError, "x must be [num_tokens, hidden] with hidden a positive multiple of block=128, got shape (2, 0)"),
    "block_none": ((ONES,), {"block": None}, jax_ep.ConfigError, "block must be a static integer, got None"),
    "block_zero": ((ONES,), {"block": 0}, jax_ep.ConfigError, "block must be at least 1, got 0"),
    "scales": ((ONES,), {"scales": "f16"}, jax_ep.ConfigError, "scales must be one of 'f32', 'e8m0', got 'f16'"),
    "dtype": ((ONES,), {"dtype": jnp.float32}, jax_ep.DTypeError, "dtype must be float8_e4m3fn or float8_e5m2, got "),
    "dtype_text": ((ONES,), {"dtype": "fp8"}, jax_ep.DTypeError, "dtype must be float8_e4m3fn or float8_e5m2, got 'fp8'"),
}  # fmt: skip


@pytest.mark.parametrize("name", QUANTIZE)
def test_quantize_fp8_refuses_bad_input(name):
    args, options, error, message = QUANTIZE[name]
    with pytest.raises(error, match=re.escape(f"quantize_fp8: {message}")):
        jax_ep.quantize_fp8(*args, **options)


ROWS, SCALES = ONES.astype(FP8_DTYPES[0]), np.ones((2, 2), np.float32)
DEQUANTIZE = {
    "list": ((ROWS, [[1.0, 1.0]] * 2), jax_ep.DTypeError, "scales must be an array, got list"),
    "bf16": ((ROWS, SCALES.astype(jnp.bfloat16)), jax_ep.DTypeError, "scales must be float32, uint8 or float8_e8m0fnu, got bfloat16"),
    "f16": ((ROWS, SCALES.astype(np.float16)), jax_ep.DTypeError, "scales must be float32, uint8 or float8_e8m0fnu, got float16"),
    "rows": ((ROWS, SCALES[:1]), jax_ep.ShapeError, "scales must be [rows=2, num_blocks] with num_blocks a divisor of hidden=128, got shape (1, 2)"),
    "more_rows": ((ROWS, np.ones((4, 1), np.float32)), jax_ep.ShapeError, "scales must be [rows=2, num_blocks] with num_blocks a divisor of hidden=128, got shape (4, 1)"),
    "blocks": ((ROWS, np.ones((2, 3), np.float32)), jax_ep.ShapeError, "scales must be [rows=2, num_blocks] with num_blocks a divisor of hidden=128, got shape (2, 3)"),
    "no_blocks": ((ROWS, SCALES[:, :0]), jax_ep.ShapeError, "scales must be [rows=2, num_blocks] with num_blocks a divisor of hidden=128, got shape (2, 0)"),
    "one_axis": ((ROWS, SCALES[:, 0]), jax_ep.ShapeError, "scales must be [rows=2, num_blocks] with num_blocks a divisor of hidden=128, got shape (2,)"),
    "x_dtype": ((ONES, SCALES), jax_ep.DTypeError, "x must be float8_e4m3fn or float8_e5m2, got float32"),
    "x_rank": ((ROWS[None], SCALES), jax_ep.ShapeError, "x must be [rows, hidden] with hidden positive, got shape (1, 2, 128)"),
    "dtype": ((ROWS, SCALES, jnp.int32), jax_ep.DTypeError, "dtype must be bfloat16, float16 or float32, got "),
}  # fmt: skip


@pytest.mark.parametrize("name", DEQUANTIZE)
def test_dequantize_fp8_refuses_bad_input(name):
    args, error, message = DEQUANTIZE[name]
    with pytest.raises(error, match=re.escape(f"dequantize_fp8: {message}")):
        jax_ep.dequantize_fp8(*args)


DISPATCH_FP8 = {
    "hidden": (100, {}, jax_ep.ShapeError, "x must be [num_tokens, hidden] with hidden a positive multiple of block=128, got shape (4, 100)"),
    "fp8_bytes": (24, {"block": 8}, jax_ep.ShapeError, "x must be [num_tokens, hidden] with hidden a multiple of 16, got shape (4, 24)"),
    "block_none": (128, {"block": None}, jax_ep.ConfigError, "block must be a static integer, got None"),
    "block_zero": (128, {"block": 0}, jax_ep.ConfigError, "block must be at least 1, got 0"),
    "scales": (128, {"scales": "f16"}, jax_ep.ConfigError, "scales must be one of 'f32', 'e8m0', got 'f16'"),
}  # fmt: skip


@pytest.mark.parametrize("name", DISPATCH_FP8)
def test_dispatch_fp8_refuses_bad_input(groups, name):
    """dispatch_fp8 raises the errors of quantize_fp8 under its own name."""
    hidden, options, error, message = DISPATCH_FP8[name]
    group = groups(2)

    def fn(x, ids):
        return jax_ep.dispatch_fp8(x, ids, group=group, num_experts=2, **options).x

    with pytest.raises(error, match=re.escape(f"dispatch_fp8: {message}")):
        on_ranks(fn, group.mesh)(np.ones((2, 4, hidden), np.float32), np.zeros((2, 4, 1), np.int32))


def test_unsupported_derivatives_are_refused_by_name(groups):
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
    "routing_and_handle": (lambda x, ids, h: jax_ep.dispatch(x, ids, handle=h), jax_ep.ConfigError, r"dispatch: with handle= these must be left out: topk_idx"),
    "fill_and_handle": (lambda x, ids, h: jax_ep.dispatch(x, handle=h, fill="none"), jax_ep.ConfigError, r"dispatch: with handle= these must be left out: fill"),
    "tokens": (lambda x, ids, h: jax_ep.dispatch(x[:3], handle=h), jax_ep.ShapeError, r"dispatch: x must have shape \(4, 128\), got \(3, 128\)"),
    "not_a_handle": (lambda x, ids, h: jax_ep.dispatch(x, handle=ids), jax_ep.ConfigError, "dispatch: handle must be the DispatchHandle of a dispatch, got"),
    "triple": (lambda x, ids, h: jax_ep.dispatch((x, x, x), handle=h), jax_ep.DTypeError, "dispatch: x must be an array or a pair, got 3 arrays"),
    "not_fp8": (lambda x, ids, h: jax_ep.dispatch((x, x), handle=h), jax_ep.DTypeError, r"dispatch: x\[0\] must be float8_e4m3fn or float8_e5m2, got float32"),
    "scales_dtype": (lambda x, ids, h: jax_ep.dispatch((x.astype(FP8_DTYPES[0]), ids), handle=h), jax_ep.DTypeError, "dispatch: scales must be float32, uint8 or float8_e8m0fnu, got int32"),
    "scales_tokens": (lambda x, ids, h: jax_ep.dispatch((x.astype(FP8_DTYPES[0]), x[:2]), handle=h), jax_ep.ShapeError, r"dispatch: scales must be \[num_tokens=4, width\] with width positive, got shape \(2, 128\)"),
    "payload_rank": (lambda x, ids, h: jax_ep.dispatch(x, handle=h, payload=x[0]), jax_ep.ShapeError, r"dispatch: payload must be \[num_tokens=4, width\] with width positive, got shape \(128,\)"),
    "payload_int4": (lambda x, ids, h: jax_ep.dispatch(x, handle=h, payload=x.astype(jnp.int4)), jax_ep.DTypeError, "rows of payload must be whole bytes; pack int4 into uint8"),
    "weights_shape": (lambda x, ids, h: jax_ep.combine_weights(x[:3], h), jax_ep.ShapeError, r"combine_weights: w must be \[recv_capacity=8, num_topk\]"),
    "block": (lambda x, ids, h: jax_ep.dispatch_fp8(x, ids, group=h, num_experts=2), jax_ep.GroupError, "dispatch_fp8: group must be a jax_ep.Group, got DispatchHandle"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_dispatch_along_a_handle_refuses_bad_input(groups, name):
    call, error, message = BAD[name]
    group = groups(2)

    def fn(x, ids):
        handle = jax_ep.dispatch(x, ids, group=group, num_experts=2).handle
        call(x, ids, handle)

    with pytest.raises(error, match=message):
        on_ranks(fn, group.mesh)(np.ones((2, 4, 128), np.float32), np.zeros((2, 4, 1), np.int32))
