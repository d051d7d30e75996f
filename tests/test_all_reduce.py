"""The all_reduce family: types, transforms, choices. The conformance suite checks values."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import jax_ep
from jax_ep import reference
from jax_ep._src.base import limits
from jax_ep._src.base.group_spec import GroupSpec
from jax_ep._src.base.options import Algorithm, Movement
from jax_ep._src.base.spec import ReduceSpec
from jax_ep.testing.compare import assert_close, assert_same_bits
from jax_ep.testing.ranks import on_ranks

OPS = (jax_ep.all_reduce, jax_ep.reduce_scatter, jax_ep.all_gather)


@pytest.mark.parametrize("allow_psum", [True, False])
def test_sums_are_typed_as_invariant(groups, backend, allow_psum):
    """JAX accepts out_specs=P() under check_vma, as for lax.psum."""
    group = groups(4)
    x = np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32)

    def fn(x):
        y = jax_ep.all_reduce(x[0], group=group, backend=backend, allow_psum=allow_psum)
        ones = jnp.ones_like(y)
        return jax_ep.all_reduce_residual_rmsnorm(
            x[0], y, ones, group=group, backend=backend, allow_psum=allow_psum
        )

    mapped = jax.shard_map(fn, mesh=group.mesh, in_specs=P("ep"), out_specs=P())
    normed, h = jax.jit(mapped)(x)
    assert_close(h, 2 * reference.all_reduce(x)[0], tolerance=1e-6)
    assert normed.shape == (6,)


def test_gradients_sum_over_axes_of_equal_operands(backend):
    """The gradient of an operand that is equal along an axis is summed over the axis."""
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "ep"))
    with jax_ep.Group.open(mesh, "ep") as group:

        def loss(x, residual, scale):
            n, h = jax_ep.all_reduce_residual_rmsnorm(
                x[0, 0], residual, scale, group=group, backend=backend, algorithm="one_shot"
            )
            return jax.lax.psum(jnp.sum(n * h), "data")

        def stock(x, residual, scale):
            h = jax.lax.psum(x[0, 0], "ep") + residual
            n = h / jnp.sqrt(jnp.mean(h * h, axis=-1, keepdims=True) + 1e-6) * scale[None]
            return jax.lax.psum(jnp.sum(n * h), "data")

        rng = np.random.default_rng(1)
        args = [rng.standard_normal(s).astype(np.float32) for s in ((2, 4, 3, 8), (3, 8), (8,))]
        specs = (P("data", "ep"), P(), P())
        grads = [
            jax.jit(
                jax.grad(
                    jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=P()), argnums=(0, 1, 2)
                )
            )(*args)
            for f in (loss, stock)
        ]
        for got, expected in zip(*grads, strict=True):
            assert_close(got, np.asarray(expected), tolerance=1e-5)


def test_a_residual_may_vary_over_the_ranks(backend):
    """A residual may vary over all of the group's axes, or over one: gradients equal psum's."""
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("a", "b"))
    rng = np.random.default_rng(6)
    x = rng.standard_normal((2, 2, 3, 8)).astype(np.float32)
    with jax_ep.Group.open(mesh, ("a", "b"), name="varies") as group:
        for axes in (("a", "b"), ("a",), ("b",), ()):
            residual = rng.standard_normal((*(2 for _ in axes), 3, 8)).astype(np.float32)

            def fused(x, residual):
                scale = jnp.ones(8)
                return jax_ep.all_reduce_residual_rmsnorm(
                    x, residual, scale, group=group, backend=backend, algorithm="one_shot"
                )

            def stock(x, residual):
                h = jax.lax.psum(x, ("a", "b")) + residual
                return h / jnp.sqrt(jnp.mean(h * h, axis=-1, keepdims=True) + 1e-6), h

            def loss(fn, x, residual, axes=axes):
                n, h = fn(x[0, 0], residual.reshape(3, 8))
                total = jnp.sum(n * h * h)
                return jax.lax.psum(total, axes) if axes else total

            grads = []
            for fn in (fused, stock):
                mapped = jax.shard_map(
                    partial(loss, fn), mesh=mesh, in_specs=(P("a", "b"), P(*axes)), out_specs=P()
                )
                grads.append(jax.jit(jax.grad(mapped, argnums=(0, 1)))(x, residual))
            for got, expected in zip(*grads, strict=True):
                assert_close(got, np.asarray(expected), tolerance=1e-5, what=str(axes))


def test_a_batch_too_large_for_its_algorithm_takes_one_shot(groups):
    """Each element fits into slots, the batch does not. On CPUs only the attribute shows it."""
    group = groups(2)
    x = np.ones((2, 4, limits.slot_payload(2) // 8), np.float32)
    call = partial(jax_ep.all_reduce, group=group, algorithm="low_latency")
    text = str(jax.make_jaxpr(on_ranks(jax.vmap(call), group.mesh, check_vma=False))(x))
    assert f"algorithm={Algorithm.ONE_SHOT}" in text
    text = str(jax.make_jaxpr(on_ranks(jax.vmap(call), group.mesh, check_vma=False))(x[..., :9]))
    assert f"algorithm={Algorithm.LOW_LATENCY}" in text


def test_operands_that_cannot_be_staged_take_stock_collectives():
    """The backward pass, with its larger operand, does so too. The spec is that of a GPU group."""
    spec = ReduceSpec(
        GroupSpec("g", ("ep",), (("ep", 4),), (0, 1, 2, 3), staging_bytes=20 << 20),
        "cuda",
        Algorithm.ONE_SHOT,
        "all_gather",
        Movement.ALL_GATHER,
    )
    small, large = (jax.ShapeDtypeStruct((n << 18,), jnp.float32) for n in (4, 10))
    assert spec.is_carried(small)
    assert spec.is_carried(large)
    back = dataclasses.replace(spec, movement=Movement.REDUCE_SCATTER)
    assert back.is_carried(jax.ShapeDtypeStruct((4, 4 << 18), jnp.float32))  # pushed
    assert not back.is_carried(jax.ShapeDtypeStruct((4, 10 << 18), jnp.float32))
    two_shot = dataclasses.replace(spec, algorithm=Algorithm.TWO_SHOT, movement=Movement.ALL_REDUCE)
    assert two_shot.is_carried(small)  # pushed
    assert not two_shot.is_carried(large)


def test_pytrees_and_numbers_are_added_like_psum(groups, backend):
    """Pytrees and Python numbers give the results of lax.psum and JAX's other collectives."""
    group = groups(2)
    x = np.arange(8, dtype=np.float32).reshape(2, 2, 2)

    def run(x):
        options = {"group": group, "backend": backend}
        total = jax_ep.all_reduce({"x": x, "n": 1, "y": (2.5, [])}, **options)
        parts = jax_ep.reduce_scatter([x, 2 * x], **options)
        assert jnp.zeros(total["n"]).shape == (2,)  # the number is known while tracing
        total = jax.tree.map(jnp.asarray, total)
        return total, parts, jax_ep.all_gather((parts[0], 3), **options)

    total, parts, gathered = on_ranks(run, group.mesh, check_vma=False)(x)
    assert_same_bits(total["x"], np.broadcast_to(x.sum(0), x.shape))
    assert (np.asarray(total["n"]).tolist(), total["n"].dtype) == ([2, 2], np.int32)
    assert np.asarray(total["y"][0]).tolist() == [5.0, 5.0]
    assert_same_bits(parts[1], 2 * x.sum(0))
    assert_same_bits(gathered[0], np.broadcast_to(x.sum(0), x.shape))
    assert np.asarray(gathered[1]).tolist() == [[3, 3], [3, 3]]
    with pytest.raises(jax_ep.GroupError, match="all_reduce: group must be"):
        jax_ep.all_reduce({}, group="no")


def test_results_have_no_weak_type(groups, backend):
    """With a weak type, later code would be widened on some back ends only."""

    def run(x):
        weak = jnp.broadcast_to(2.0, x.shape)
        assert weak.weak_type
        with jax.numpy_dtype_promotion("standard"):
            return jnp.bfloat16(1) * jax_ep.all_reduce(weak, group=groups(2), backend=backend)

    got = on_ranks(run, groups(2).mesh, check_vma=False)(np.ones((2, 3), np.float32))
    assert_same_bits(got, np.full((2, 3), 4, np.float32))


def test_long_rows_keep_their_digits(groups, backend):
    """Squares that are added one by one in f32 would be off by 3e-5 here."""
    x = np.full((2, 1, 16_384), 1.65, np.float32)
    fused = partial(jax_ep.all_reduce_residual_rmsnorm, eps=0.0, algorithm="one_shot")
    run = on_ranks(
        lambda x: fused(x, 0 * x, x[0] * 0 + 1, group=groups(2), backend=backend),
        groups(2).mesh,
        check_vma=False,
    )
    assert_close(run(x)[0], np.ones_like(x), tolerance=1e-6)


def test_wide_rows_are_added_in_rank_order(groups, backend):
    """Rows too wide for the kernel take `all_reduce` and XLA, with the same bits."""
    rng = np.random.default_rng(5)
    x, residual = rng.standard_normal((2, 2, 3, 40_000)).astype(jnp.bfloat16)
    residual = np.broadcast_to(residual[:1], residual.shape)
    scale = np.ones((2, 40_000), np.float32)
    allow_psum = backend == "xla"
    options = {"group": groups(2), "allow_psum": allow_psum, "backend": backend}

    def run(x, residual, scale):
        fused = partial(jax_ep.all_reduce_residual_rmsnorm, eps=1e-6, **options)
        one_by_one = jax_ep.all_reduce(x, **options) + residual
        results = fused(x, residual, scale)
        grads = jax.grad(lambda *a: jnp.sum(fused(*a)[0].astype(jnp.float32)))(x, residual, scale)
        return results, one_by_one, grads

    (normed, total), one_by_one, grads = on_ranks(run, groups(2).mesh, check_vma=False)(
        x, residual, scale
    )
    assert_same_bits(total, one_by_one)
    expected = reference.all_reduce_residual_rmsnorm(x, residual, scale, eps=1e-6)
    assert_same_bits(total, expected[1])
    assert_close(normed, expected[0], tolerance=1e-2)
    assert grads.shape == x.shape


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("hidden", [64, 40_000])  # 40,000 elements have no kernel
def test_operands_are_rounded_before_they_are_added(groups, backend, hidden, dtype, num_ranks):
    """XLA contracts no product with a later sum, and drops no rounding."""
    group = groups(num_ranks)
    rng = np.random.default_rng(6)
    factors = rng.standard_normal((2, num_ranks, 3, hidden), np.float32)
    onto = np.broadcast_to(rng.standard_normal((2, 1, 3, hidden), np.float32), factors.shape)
    is_wide = hidden > 64
    options = {"group": group, "allow_psum": is_wide and backend == "xla", "backend": backend}
    algorithm = "auto" if is_wide else "one_shot"

    def run(a, b, c, d, scale):
        x, residual = (a * b).astype(dtype), (c * d).astype(dtype)
        fused = partial(jax_ep.all_reduce_residual_rmsnorm, algorithm=algorithm, **options)
        return fused(x, residual, scale)[1].astype(jnp.float32)

    got = on_ranks(run, group.mesh, check_vma=False)(
        *factors, *onto, np.ones((num_ranks, hidden), np.float32)
    )
    # NumPy rounds each product.
    x, residual = (np.multiply(*pair).astype(jnp.dtype(dtype)) for pair in (factors, onto))
    scale = np.ones((num_ranks, hidden), np.float32)
    _, expected = reference.all_reduce_residual_rmsnorm(x, residual, scale, eps=1e-6)
    assert_same_bits(got, expected.astype(np.float32))


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "complex64", "uint8"])
def test_gathers_move_bytes_unchanged(groups, backend, dtype):
    group = groups(2)
    x = np.arange(12).reshape(2, 6).astype(jnp.dtype(dtype))
    gather = partial(jax_ep.all_gather, group=group, allow_psum=False, backend=backend)
    got = on_ranks(gather, group.mesh, check_vma=False)(x)
    assert_same_bits(got.view(np.uint8), np.stack([x, x]).view(np.uint8))
    if dtype == "complex64":

        def loss(x, gather):
            return jnp.sum(jnp.abs(gather(x) * jnp.arange(1, 3, dtype=x.dtype)[:, None]))

        grads = [
            on_ranks(jax.grad(partial(loss, gather=g)), group.mesh, check_vma=False)(x + 1)
            for g in (gather, lambda x: jax.lax.all_gather(x, "ep"))
        ]
        assert_close(*(np.asarray(g).view(np.float32) for g in grads), tolerance=1e-6)


@pytest.mark.parametrize("op", [*OPS, jax_ep.all_reduce_residual_rmsnorm])
@pytest.mark.parametrize("algorithm", ["psum", "one_shot"])
def test_another_device_order_is_an_error(groups, backend, op, algorithm):
    group = groups(2)
    backwards = Mesh(group.mesh.devices[::-1], group.axes)
    num_operands = 1 if op in OPS else 3

    def run(x):
        operands = (x, x, x[0])[:num_operands]
        return op(*operands, group=group, backend=backend, algorithm=algorithm)

    with pytest.raises(jax_ep.GroupError, match=r"jax\.shard_map runs over the mesh"):
        on_ranks(run, backwards, check_vma=False)(np.ones((2, 2, 4), np.float32))


@pytest.mark.parametrize(
    "op", [jax_ep.all_reduce, jax_ep.all_gather, jax_ep.all_reduce_residual_rmsnorm]
)
def test_the_policy_keeps_sums(groups, op):
    """The program has as many calls as one that keeps everything, so no sum is computed twice."""
    group = groups(2)
    num_operands = 3 if op is jax_ep.all_reduce_residual_rmsnorm else 1

    def layer(x):
        h = jnp.tanh(x)
        results = op(*(h, h, h[0])[:num_operands], group=group, algorithm="one_shot")
        return sum(jnp.sum(jnp.sin(y)) for y in jax.tree.leaves(results))

    def count(policy):
        grad = jax.grad(lambda x: jnp.sin(jax.checkpoint(layer, policy=policy)(x)))
        mapped = on_ranks(grad, group.mesh, check_vma=False)
        x = np.ones((2, 2, 4), np.float32)
        return mapped.lower(x).as_text().count("@jax_ep.all_reduce")

    kept = count(jax.checkpoint_policies.everything_saveable)
    assert count(jax_ep.save_communication_policy()) == kept < count(None)


def test_vmap_folds_the_batch(groups, backend):
    group = groups(4)
    rng = np.random.default_rng(2)
    x = rng.standard_normal((4, 3, 4, 8)).astype(np.float32)
    scale = rng.random((4, 3, 8)).astype(np.float32)
    options = {"group": group, "backend": backend, "allow_psum": False}
    for op in OPS:
        call = partial(op, **options)
        each = on_ranks(lambda x, call=call: jnp.stack([call(b) for b in x]), group.mesh)
        got = on_ranks(jax.vmap(call), group.mesh)(x)
        assert_same_bits(got, np.asarray(each(x)), what=op.__name__)
        last = on_ranks(jax.vmap(call, in_axes=-1, out_axes=-1), group.mesh)
        assert_same_bits(last(np.moveaxis(x, 1, -1)), np.moveaxis(np.asarray(got), 1, -1))

    def norm(x, scale):
        return jax_ep.all_reduce_residual_rmsnorm(x, x[:1] * 0 + 1 + 0 * x, scale, **options)

    none = on_ranks(jax.vmap(norm), group.mesh)(x[:, :0], scale[:, :0])
    assert none[0].shape == (4, 0, 4, 8)
    for axes in ((0, None), (0, 0)):
        scales = scale if axes[1] == 0 else scale[:, 0]
        got = on_ranks(jax.vmap(norm, in_axes=axes), group.mesh)(x, scales)
        for b in range(3):
            expected = on_ranks(norm, group.mesh)(x[:, b], scale[:, b] if axes[1] == 0 else scales)
            for g, e in zip(got, expected, strict=True):
                assert_same_bits(g[:, b], np.asarray(e))


def test_scan_remat_and_export_agree_with_psum(groups):
    group = groups(4)
    x = np.random.default_rng(3).standard_normal((4, 16)).astype(np.float32)

    def layer(x, _):
        y = jax_ep.all_reduce(jnp.sin(x), group=group, allow_psum=False)
        return jax.lax.pcast(y, "ep", to="varying"), None

    def loss(x):
        return jnp.sum(jax.lax.scan(jax.checkpoint(layer), x, length=3)[0])

    def stock(x):
        for _ in range(3):
            x = jax.lax.pcast(jax.lax.psum(jnp.sin(x), "ep"), "ep", to="varying")
        return jnp.sum(x)

    grads = [on_ranks(jax.grad(f), group.mesh)(x) for f in (loss, stock)]
    assert_close(grads[0], np.asarray(grads[1]), tolerance=1e-4)

    def call(x):
        return jax_ep.all_reduce(x, group=group, allow_psum=False)

    fn = on_ranks(call, group.mesh)
    checks = jax_ep.export_safety_checks()
    exported = jax.export.export(fn, disabled_checks=checks)(x)
    loaded = jax.export.deserialize(exported.serialize())
    sharding = jax.sharding.NamedSharding(group.mesh, P("ep"))
    assert_same_bits(jax.jit(loaded.call)(jax.device_put(x, sharding)), reference.all_reduce(x))


def test_tiled_collectives_and_trees_agree_with_numpy(groups, backend):
    group = groups(3)
    x = np.arange(3 * 6 * 2, dtype=np.float32).reshape(3, 6, 2)
    options = {"group": group, "backend": backend}
    parts = on_ranks(partial(jax_ep.reduce_scatter, tiled=True, **options), group.mesh)(x)
    assert_same_bits(parts, np.sum(x, axis=0).reshape(3, 2, 2))
    whole = on_ranks(partial(jax_ep.all_gather, tiled=True, **options), group.mesh)(x)
    assert_same_bits(whole, np.broadcast_to(x.reshape(18, 2), (3, 18, 2)))
    for op, shape in ((jax_ep.reduce_scatter, (3, 2, 0)), (jax_ep.all_gather, (3, 18, 0))):
        assert on_ranks(partial(op, tiled=True, **options), group.mesh)(x[..., :0]).shape == shape
    tree: dict[str, Any] = {"a": x, "b": (x[:, 0].astype(np.int32),)}
    sums = on_ranks(partial(jax_ep.all_reduce, **options), group.mesh, check_vma=False)(tree)
    assert_same_bits(sums["b"][0], reference.all_reduce(tree["b"][0]))
    assert_same_bits(sums["a"], reference.all_reduce(x))


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_random_keys_are_gathered(groups, backend, impl, tiled):
    """Keys are gathered as arrays of their own shape, which JAX 0.12 cannot lower untiled."""
    keys = jax.random.split(jax.random.key(0, impl=impl), (3, 4))
    options = {"group": groups(3), "tiled": tiled, "backend": backend}
    for algorithm in ("auto", "one_shot"):
        got = on_ranks(
            lambda tree, a=algorithm: jax_ep.all_gather(tree, algorithm=a, **options),
            groups(3).mesh,
        )({"keys": keys})["keys"]
        assert got.dtype == keys.dtype
        wanted = keys.reshape(12) if tiled else keys
        assert got.shape == (3, *wanted.shape)
        words = np.asarray(jax.random.key_data(wanted))
        assert_same_bits(jax.random.key_data(got), np.broadcast_to(words, (3, *words.shape)))


@pytest.mark.parametrize("op", ["all_reduce", "reduce_scatter"])
@pytest.mark.parametrize("algorithm", ["auto", "psum", "one_shot"])
def test_random_keys_are_refused_by_sums(groups, backend, op, algorithm):
    keys = jax.random.split(jax.random.key(0), (2, 2))
    call = partial(getattr(jax_ep, op), group=groups(2), algorithm=algorithm, backend=backend)
    with pytest.raises(jax_ep.DTypeError, match=f"{op}: x must be numbers, got random keys, key<f"):
        on_ranks(call, groups(2).mesh)(keys)


def test_a_scalar_random_key_is_refused_by_tiled(groups):
    call = partial(jax_ep.all_gather, group=groups(2), tiled=True)
    with pytest.raises(
        jax_ep.ShapeError, match=r"all_gather: with tiled=True, x must have an axis"
    ):
        on_ranks(call, groups(2).mesh)(jax.random.split(jax.random.key(0)))


def test_other_dtypes_and_empty_arrays_take_psum(groups, backend):
    group = groups(2)
    options = {"group": group, "backend": backend}
    for x in (np.ones((2, 3), np.uint8), np.ones((2, 3), np.complex64), np.ones((2, 0))):
        got = on_ranks(partial(jax_ep.all_reduce, **options), group.mesh, check_vma=False)(x)
        assert got.dtype == jnp.asarray(x).dtype
        np.testing.assert_array_equal(got, np.broadcast_to(x.sum(0, dtype=x.dtype), x.shape))
    quarters = np.ones((2, 3), jnp.int4)
    got = on_ranks(partial(jax_ep.all_gather, **options), group.mesh)(quarters)
    assert_same_bits(got.astype(jnp.int8), np.ones((2, 2, 3), np.int8))
    flags = np.array([[True, False], [False, False]])
    got = on_ranks(partial(jax_ep.all_gather, **options), group.mesh)(flags)
    np.testing.assert_array_equal(got, np.broadcast_to(flags, (2, 2, 2)))


BAD: dict[str, Any] = {
    "dtype": (jax_ep.all_reduce, [np.ones((2, 3), np.uint8)], {"allow_psum": False}, jax_ep.DTypeError, "all_reduce: x, for all algorithms but psum, must be bfloat16, float16, float32 or int32, got uint8"),
    "empty": (jax_ep.all_reduce, [np.ones((2, 0), np.float32)], {"algorithm": "one_shot"}, jax_ep.ConfigError, r"all_reduce: only psum takes an x without elements, got shape \(0,\)"),
    "algorithm": (jax_ep.all_reduce, [np.ones((2, 3))], {"algorithm": "ring"}, jax_ep.ConfigError, "all_reduce: algorithm must be one of 'auto', 'low_latency', 'one_shot', 'two_shot', 'psum', got 'ring'"),
    "backend": (jax_ep.all_reduce, [np.ones((2, 3))], {"backend": "tpu"}, jax_ep.ConfigError, "all_reduce: backend must be one of"),
    "scatter": (jax_ep.reduce_scatter, [np.ones((2, 3))], {}, jax_ep.ShapeError, r"reduce_scatter: the first axis of x must be num_ranks=2, got shape \(3,\)"),
    "tiled": (jax_ep.reduce_scatter, [np.ones((2, 3))], {"tiled": True}, jax_ep.ShapeError, r"must be a multiple of num_ranks=2, got shape \(3,\)"),
    "gather": (jax_ep.all_gather, [np.ones(2)], {"tiled": True}, jax_ep.ShapeError, r"all_gather: with tiled=True, x must have an axis"),
    "residual": (jax_ep.all_reduce_residual_rmsnorm, [np.ones((2, 3)), np.ones((2, 4)), np.ones((2, 3))], {}, jax_ep.ShapeError, r"residual must have shape \(3,\), got \(4,\)"),
    "scale": (jax_ep.all_reduce_residual_rmsnorm, [np.ones((2, 3)), np.ones((2, 3)), np.ones((2, 4))], {}, jax_ep.ShapeError, r"scale must have shape \(3,\), got \(4,\)"),
    "norm_dtype": (jax_ep.all_reduce_residual_rmsnorm, [np.ones((2, 3), np.int32)] * 3, {}, jax_ep.DTypeError, "x must be bfloat16, float16 or float32, got int32"),
    "eps": (jax_ep.all_reduce_residual_rmsnorm, [np.ones((2, 3))] * 3, {"eps": -1.0}, jax_ep.ConfigError, "eps must be a static number of at least 0, got -1.0"),
    "slots": (jax_ep.all_reduce, [np.ones((2, 600_000))], {"algorithm": "low_latency"}, jax_ep.ConfigError, "algorithm='low_latency' takes at most 2097152 bytes from a rank here, got 2400000"),
    "two_halves": (jax_ep.reduce_scatter, [np.ones((2, 2))], {"algorithm": "two_shot"}, jax_ep.ConfigError, "reduce_scatter: algorithm must not be 'two_shot'"),
    "two_others": (jax_ep.all_gather, [np.ones((2, 2))], {"algorithm": "two_shot"}, jax_ep.ConfigError, "all_gather: algorithm must not be 'two_shot'"),
    "neither": (jax_ep.all_reduce, [np.ones((2, 2))], {"algorithm": "psum", "allow_psum": False}, jax_ep.ConfigError, "all_reduce: allow_psum=False forbids algorithm='psum'"),
    "two_shot": (jax_ep.all_reduce_residual_rmsnorm, [np.ones((2, 3))] * 3, {"algorithm": "two_shot"}, jax_ep.ConfigError, "algorithm must not be 'two_shot'"),
    "wide": (jax_ep.all_reduce_residual_rmsnorm, [np.ones((2, 20_000))] * 3, {"algorithm": "one_shot"}, jax_ep.ConfigError, "algorithm='one_shot' takes rows of at most 65536 bytes, got 80000"),
    "no_row": (jax_ep.all_reduce_residual_rmsnorm, [np.ones((2, 3, 0))] * 2 + [np.ones((2, 0))], {}, jax_ep.ShapeError, r"hidden positive, got shape \(3, 0\)"),
    "large_eps": (jax_ep.all_reduce_residual_rmsnorm, [np.ones((2, 3))] * 3, {"eps": 1e39}, jax_ep.ConfigError, "eps must be finite in float32, got 1e\\+39"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_by_name(groups, case):
    op, args, options, error, match = BAD[case]
    group = groups(2)
    args = [a if a.dtype != np.float64 else a.astype(np.float32) for a in args]
    with pytest.raises(error, match=match):
        on_ranks(partial(op, group=group, **options), group.mesh, check_vma=False)(*args)
