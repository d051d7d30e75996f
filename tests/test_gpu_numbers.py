"""Roundings and zero signs that XLA:GPU would drop: JAX_PLATFORMS=cuda,cpu pytest -m gpu."""

from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jax_ep
from jax_ep import reference
from jax_ep._src.ops.dispatch.fp8 import FP8_DTYPES
from jax_ep.testing import conformance
from jax_ep.testing.compare import assert_same_bits
from jax_ep.testing.conformance.round_trips import sums_of_negative_zeros_are_positive
from jax_ep.testing.ranks import make_mesh, on_ranks

pytestmark = pytest.mark.gpu

BACKENDS = ("cuda", "xla")


@pytest.fixture(scope="module", params=["one_rank", "all_ranks"])
def group(request):
    """Opens a group over one rank: there XLA sees through its collectives."""
    num_ranks = 1 if request.param == "one_rank" else len(jax.devices())
    with jax_ep.Group.open(make_mesh(num_ranks), "ep", name="numbers", timeout=60.0) as opened:
        yield opened


def _numbers(shape, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(shape) * np.exp(rng.normal(0, 3, shape))).astype(np.float32)


@pytest.mark.parametrize("fp8", FP8_DTYPES, ids=lambda d: jnp.dtype(d).name)
@pytest.mark.parametrize("scales", ["f32", "e8m0"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=lambda d: jnp.dtype(d).name)
def test_fp8_is_rounded_in_one_program(scales, fp8, dtype):
    """One program gives the bits of two programs, subnormals and saturation included."""
    x = _numbers((64, 4096))
    x[:, :4] = [448, -57344, 2.0**-9, -(2.0**-16)]
    x = jnp.asarray(x, dtype)
    quantize = partial(jax_ep.quantize_fp8, scales=scales, dtype=fp8)
    dequantize = partial(jax_ep.dequantize_fp8, dtype=jnp.float32)
    got = jax.jit(lambda x: dequantize(*quantize(x)))(x)
    rows, stored = jax.jit(quantize)(x)
    assert_same_bits(got, np.asarray(jax.jit(dequantize)(rows, stored)))
    blocks = np.asarray(x, np.float32).reshape(64, 32, 128)
    # Every number is an fp8 number times its scale.
    scale = np.asarray(stored)
    scale = scale if scales == "f32" else np.exp2(scale.astype(np.float32) - 127)
    on_grid = np.asarray(got).reshape(blocks.shape) / scale[..., None]
    np.testing.assert_allclose(on_grid, on_grid.astype(fp8).astype(np.float32), rtol=1e-6)
    assert not np.array_equal(on_grid * scale[..., None], blocks)
    if scales == "e8m0":  # exact products, so this tests the conversion alone
        largest = float(ml_dtypes.finfo(fp8).max)
        scaled = np.clip(blocks / scale[..., None], -largest, largest).reshape(x.shape)
        assert_same_bits(rows, np.asarray(jax.jit(lambda a: a.astype(fp8))(scaled)))


@pytest.mark.parametrize("scales", ["f32", "e8m0"])
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
def test_a_block_that_is_not_finite_arrives_as_nan(scales, value):
    x = _numbers((64, 4096))
    x[3, 261] = value
    expected = np.zeros(x.shape, bool)
    expected[3, 256:384] = True
    quantize = partial(jax_ep.quantize_fp8, scales=scales)
    for call in (quantize, jax.jit(quantize)):
        back = jax.jit(jax_ep.dequantize_fp8)(*call(x))
        np.testing.assert_array_equal(np.isnan(np.asarray(back, np.float32)), expected)
    back = jax.jit(lambda x: jax_ep.dequantize_fp8(*quantize(x)))(x)
    np.testing.assert_array_equal(np.isnan(np.asarray(back, np.float32)), expected)


def test_dequantize_fp8_takes_every_e8m0_scale():
    """GPUs keep subnormal products, so they are compared, too."""
    byte = np.arange(256, dtype=np.uint8)[:, None]
    x = np.broadcast_to(np.array([448, -1.75, 2.0**-9, 0], np.float32), (256, 4))
    wide = x * np.exp2(byte.astype(np.float64) - 127)
    wide[255] = np.nan
    with np.errstate(over="ignore"):
        expected = wide.astype(np.float32)
    for scales in (byte, byte.view(jnp.float8_e8m0fnu)):
        got = jax.jit(partial(jax_ep.dequantize_fp8, dtype=jnp.float32))(
            x.astype(FP8_DTYPES[0]), scales
        )
        assert_same_bits(got, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scales", ["f32", "e8m0"])
def test_rows_are_rounded_to_fp8_on_the_way(group, backend, scales):
    """dispatch_fp8 gives the bits of its parts in separate programs."""
    num_ranks = group.num_ranks
    x = _numbers((num_ranks, 64, 1024))
    ids = np.zeros((num_ranks, 64, 1), np.int32) + np.arange(num_ranks)[:, None, None]
    call = partial(
        jax_ep.dispatch_fp8, group=group, num_experts=num_ranks, scales=scales, backend=backend
    )
    got = on_ranks(lambda x, ids: call(x, ids).x[:64], group.mesh)(x, ids.astype(np.int32))
    for rank in range(num_ranks):
        pair = jax.jit(partial(jax_ep.quantize_fp8, scales=scales))(x[rank])
        expected = jax.jit(partial(jax_ep.dequantize_fp8, dtype=jnp.float32))(*pair)
        assert_same_bits(np.asarray(got)[rank], np.asarray(expected))
    assert not np.array_equal(np.asarray(got), x)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "check",
    [c for c in conformance.CHECKS if c.run is sums_of_negative_zeros_are_positive],
    ids=str,
)
def test_sums_of_negative_zeros_are_positive(group, backend, check):
    check(group, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("layout", ["rank", "expert"])
def test_rows_and_biases_are_rounded_before_they_are_added(group, backend, layout, dtype):
    """XLA contracts no product with a sum of combine, and drops no rounding."""
    num_ranks = group.num_ranks
    rng = np.random.default_rng(3)
    ids = rng.integers(0, 4 * num_ranks, (num_ranks, 32, 4)).astype(np.int32)
    factors = rng.standard_normal((2, num_ranks, 128 * num_ranks, 256), np.float32)

    def run(rows, bias, ids):
        x = jnp.zeros((32, 16), jnp.float32)
        out = jax_ep.dispatch(
            x, ids, group=group, num_experts=4 * num_ranks, layout=layout,
            recv_capacity=128 * num_ranks, backend=backend,
        )  # fmt: skip
        y = jax_ep.combine(rows, out.handle, bias=bias, backend=backend)
        return y.astype(jnp.float32)

    def product(a, b):
        return (a * b).astype(dtype)

    fused = on_ranks(
        lambda a, b, ids: run(product(a, b), product(a[:32], b[32:64]), ids), group.mesh
    )
    # NumPy rounds each product.
    kind = jnp.dtype(dtype)
    rows = np.multiply(*factors).astype(kind)
    bias = (factors[0, :, :32] * factors[1, :, 32:64]).astype(kind)
    plan = reference.make_plan(
        ids, num_experts=4 * num_ranks, layout=layout, recv_capacity=128 * num_ranks
    )
    expected = reference.combine(plan, rows, None, (bias,)).astype(np.float32)
    assert_same_bits(fused(*factors, ids), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("hidden", [64, 40_000])  # 40,000 elements have no kernel
def test_operands_are_rounded_before_a_norm(group, backend, hidden, dtype):
    """Terms, residual and their sum are rounded, though the program widens the new residual."""
    num_ranks = group.num_ranks
    rng = np.random.default_rng(6)
    factors = rng.standard_normal((2, num_ranks, 3, hidden), np.float32)
    onto = np.broadcast_to(rng.standard_normal((2, 1, 3, hidden), np.float32), factors.shape)
    scale = np.ones((num_ranks, hidden), np.float32)
    # Back end `xla` uses psum, whose order makes no difference with two terms.
    is_wide = hidden * jnp.dtype(dtype).itemsize > 65536
    options = {"group": group, "backend": backend, "allow_psum": is_wide and backend == "xla"}
    algorithm = "auto" if is_wide else "one_shot"

    def run(a, b, c, d, scale):
        x, residual = (a * b).astype(dtype), (c * d).astype(dtype)
        fused = partial(jax_ep.all_reduce_residual_rmsnorm, algorithm=algorithm, **options)
        return fused(x, residual, scale)[1].astype(jnp.float32)

    got = on_ranks(run, group.mesh, check_vma=False)(*factors, *onto, scale)
    x, residual = (np.multiply(*pair).astype(jnp.dtype(dtype)) for pair in (factors, onto))
    _, expected = reference.all_reduce_residual_rmsnorm(x, residual, scale, eps=1e-6)
    if num_ranks <= 2 or not options["allow_psum"]:
        assert_same_bits(got, expected.astype(np.float32))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tiled", [False, True])
def test_random_keys_are_gathered(group, backend, tiled):
    num_ranks = group.num_ranks
    keys = jax.random.split(jax.random.key(0), (num_ranks, 4))
    call = partial(jax_ep.all_gather, group=group, tiled=tiled, backend=backend)
    for algorithm in ("auto", "one_shot"):
        got = on_ranks(partial(call, algorithm=algorithm), group.mesh)(keys)
        words = np.asarray(jax.random.key_data(keys.reshape(-1) if tiled else keys))
        wanted = np.broadcast_to(words, (num_ranks, *words.shape))
        assert_same_bits(jax.random.key_data(got), wanted)
