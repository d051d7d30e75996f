"""Checks of the all_reduce family: values to the bit, and gradients equal to JAX's."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_ep
from jax_ep import reference
from jax_ep._src.base import limits
from jax_ep.testing.compare import assert_close, assert_same_bits, shards
from jax_ep.testing.conformance.check import Check, noted
from jax_ep.testing.ranks import on_group, on_ranks, place

DTYPES: dict[str, Any] = {
    "bf16": jnp.bfloat16,
    "f16": np.float16,
    "f32": np.float32,
    "i32": np.int32,
}
ALGORITHMS = ("low_latency", "one_shot", "two_shot")
# Sizes around a vector of 16 bytes, the vectors of a warp, of a block and of several blocks.
SIZES = (1, 3, 4, 5, 8, 9, 255, 257, 4096, 4099, 40_000)
# JAX's own collectives.
_STOCK: dict[str, Callable[..., Any]] = {
    "all_reduce": jax.lax.psum,
    "reduce_scatter": jax.lax.psum_scatter,
    "all_gather": jax.lax.all_gather,
}
_PAYLOADS = {"one_shot": limits.push_payload, "two_shot": limits.two_shot_payload}
_NORM_OP = "all_reduce_residual_rmsnorm"
_NORM_SHAPES = ((1, 8), (3, 12), (2, 1000), (70, 128), (5, 4104))
_NORM_TOLERANCES = {"bf16": 1e-2, "f16": 1e-3, "f32": 2e-6}


def sums(group: jax_ep.Group, backend: str, *, op: str, dtype: str, algorithm: str) -> None:
    """Compares all sizes in one program, whose calls use the same memory in turns."""
    ours, reference_of = getattr(jax_ep, op), getattr(reference, op)
    arrays = [_random(group, dtype, op, size, seed=size) for size in SIZES]
    # An array that a GPU has no room to receive is read in place by peers, or from a copy.
    if backend == "cuda" and algorithm in _PAYLOADS:
        elements = _PAYLOADS[algorithm](group.num_ranks) // np.dtype(DTYPES[dtype]).itemsize
        large = _random(group, dtype, op, elements + 1, seed=2)
        copies = algorithm == "one_shot" and group.spec.can_stage(large[0])
        if copies or group.spec.staging_bytes is None:
            arrays.append(large)
    arrays.append(_random(group, dtype, op, 64, seed=1).reshape(_shape(group, op, (2, 4, 8))))
    call = partial(ours, group=group, algorithm=algorithm, allow_psum=False, backend=backend)

    def run(*xs: Any) -> Any:
        sums = [call(x) for x in xs]
        return sums, sums[-1].astype(jnp.float32)

    results, wide = on_group(run, group, check_vma=False)(*arrays)
    group.check(results)
    for x, got in zip(arrays, results, strict=True):
        with noted(f"shape {x.shape}"):
            assert_same_bits(got, reference_of(x), what=op)
    # The result must be rounded even if the same program widens it.
    assert_same_bits(wide, reference_of(arrays[-1]).astype(np.float32), what=f"{op}, widened")


def special_values(group: jax_ep.Group, backend: str, *, dtype: str, algorithm: str) -> None:
    """Compares sums of signed zeros, infinities, NaNs, subnormals and words like small epochs."""
    kind = np.dtype(DTYPES[dtype])
    bits = np.dtype(f"u{kind.itemsize}")
    words = np.arange(64, dtype=np.uint32).view(bits)
    ones = np.ones_like(words)
    words = np.concatenate([words, ones * 0, ones << (8 * kind.itemsize - 1)])
    values = words.astype(bits).view(kind)
    if kind.kind != "i":
        extra = np.array([np.inf, -np.inf, np.nan, 0.0, -0.0, 1.0], np.float32).astype(kind)
        values = np.concatenate([values, extra])
        if backend == "xla":  # XLA flushes subnormals on CPUs
            wide = np.abs(values.astype(np.float32))
            values = values[~((wide > 0) & (wide < 2.0 ** (-14 if dtype == "f16" else -126)))]
    num_ranks = group.num_ranks
    x = np.stack([np.roll(values, 7 * r) for r in range(num_ranks)])
    x[:, -1] = x[0, -1]
    call = partial(
        jax_ep.all_reduce, group=group, algorithm=algorithm, allow_psum=False, backend=backend
    )
    got = on_group(call, group, check_vma=False)(x)
    with np.errstate(invalid="ignore", over="ignore"):
        assert_same_bits(got, reference.all_reduce(x), what="all_reduce")


def norms(group: jax_ep.Group, backend: str, *, dtype: str, algorithm: str) -> None:
    """Compares rows with sizes around a vector and a block, and scales of both dtypes."""
    rng = np.random.default_rng(3)
    for rows, hidden in _NORM_SHAPES:
        shape = (group.num_ranks, rows, hidden)
        x = rng.standard_normal(shape).astype(DTYPES[dtype])
        residual = np.broadcast_to(rng.standard_normal(shape[1:]), shape).astype(DTYPES[dtype])
        scale = np.broadcast_to(rng.random(hidden), (group.num_ranks, hidden))
        scale = scale.astype(DTYPES[dtype] if rows % 2 else np.float32)
        options: dict[str, Any] = {"group": group, "allow_psum": False, "backend": backend}
        call = partial(jax_ep.all_reduce_residual_rmsnorm, eps=1e-3, algorithm=algorithm, **options)
        pass_on = partial(jax_ep.all_gather, algorithm="one_shot", **options)

        def run(*operands: Any, call: Any = call, pass_on: Any = pass_on) -> Any:
            normed, new_residual = call(*operands)
            wide = new_residual.astype(jnp.float32)
            return normed, new_residual, wide, pass_on(normed)[0]

        results = on_group(run, group, check_vma=False)(x, residual, scale)
        group.check(results)
        normed, new_residual, wide, of_rank_0 = results
        expected = reference.all_reduce_residual_rmsnorm(x, residual, scale, eps=1e-3)
        with noted(f"{rows} rows of {hidden}"):
            assert_same_bits(new_residual, expected[1], what="new_residual")
            # The result must be rounded even if the same program widens it.
            assert_same_bits(wide, expected[1].astype(np.float32), what="new_residual, widened")
            assert_close(normed, expected[0], tolerance=_NORM_TOLERANCES[dtype], what="normed")
            for (_, own), (_, other) in zip(shards(normed), shards(of_rank_0), strict=True):
                assert_same_bits(own, other, what="normed of rank 0")


def reduction_gradients(
    group: jax_ep.Group, backend: str, *, op: str, check_vma: bool, outside: bool
) -> None:
    """Compares gradients with those of JAX's own collectives; small integers make sums exact."""
    ours, stock = getattr(jax_ep, op), _STOCK[op]
    x = np.random.default_rng(4).integers(-3, 4, _shape(group, op, (6, 5))).astype(np.float32)
    grads = [
        _gradient(group, lambda x, call=call: call(2 * x), check_vma=check_vma, outside=outside)(x)
        for call in (
            partial(ours, group=group, algorithm="one_shot", backend=backend),
            lambda x: stock(x, group.axes),
        )
    ]
    for (_, got), (_, expected) in zip(*(shards(grad) for (grad,) in grads), strict=True):
        assert_same_bits(got, expected, what="gradient")


def norm_gradients(group: jax_ep.Group, backend: str, *, check_vma: bool, outside: bool) -> None:
    """Compares gradients with those of the operations one by one."""
    rng = np.random.default_rng(5)
    ranks = group.num_ranks
    x, residual = rng.standard_normal((2, ranks, 4, 24)).astype(np.float32)
    operands = x, residual, rng.random((ranks, 24), np.float32)

    def fused(x: Any, residual: Any, scale: Any) -> Any:
        return jax_ep.all_reduce_residual_rmsnorm(
            x, residual, scale, group=group, algorithm="one_shot", backend=backend
        )

    def one_by_one(x: Any, residual: Any, scale: Any) -> Any:
        h = jax.lax.psum(x, group.axes) + residual
        mean = jnp.mean(h * h, axis=-1, keepdims=True)
        return h / jnp.sqrt(mean + 1e-6) * scale[None], h

    grads = [
        _gradient(
            group,
            lambda *operands, call=call: jnp.concatenate(call(*operands)),
            check_vma=check_vma,
            outside=outside,
        )(*operands)
        for call in (fused, one_by_one)
    ]
    for of, *both in zip(("x", "residual", "scale"), *grads, strict=True):
        for (_, got), (_, expected) in zip(*map(shards, both), strict=True):
            assert_close(got, expected, tolerance=1e-5, what=f"gradient of {of}")


def _gradient(
    group: jax_ep.Group, call: Callable[..., Any], *, check_vma: bool, outside: bool
) -> Callable[..., Any]:
    """Returns the gradients of a sum of squares by each operand, taken around or in shard_map."""

    def loss(*operands: Any) -> Any:
        y = call(*operands)
        return jnp.sum(y * y)

    def gradient(*operands: Any) -> Any:
        each = tuple(range(len(operands)))
        spread = partial(on_ranks, mesh=group.mesh, axes=group.axes, check_vma=check_vma)
        grad: Callable[..., Any]
        if outside:
            mapped = spread(loss)
            grad = jax.jit(jax.grad(lambda *operands: jnp.sum(mapped(*operands)), each))
        else:
            grad = spread(jax.grad(loss, each))
        return grad(*place(operands, group.mesh, group.axes))

    return gradient


def _shape(group: jax_ep.Group, op: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape of the operands of all ranks."""
    ranks = (group.num_ranks,) * (2 if op == "reduce_scatter" else 1)
    return (*ranks, *shape)


def _random(group: jax_ep.Group, dtype: str, op: str, size: int, *, seed: int) -> Any:
    rng = np.random.default_rng(seed)
    shape = _shape(group, op, (size,))
    if dtype == "i32":
        return rng.integers(-(2**31), 2**31, shape, dtype=np.int32)
    return rng.standard_normal(shape).astype(DTYPES[dtype])


def _checks() -> Iterator[Check]:
    for op in _STOCK:
        for dtype in DTYPES:
            for algorithm in ALGORITHMS[: 3 if op == "all_reduce" else 2]:
                params = {"op": op, "dtype": dtype, "algorithm": algorithm}
                yield Check(sums, frozenset({op}), params)
    for dtype in DTYPES:
        for algorithm in ALGORITHMS:
            yield Check(
                special_values,
                frozenset({"all_reduce"}),
                {"dtype": dtype, "algorithm": algorithm},
            )
    for dtype in _NORM_TOLERANCES:
        for algorithm in ALGORITHMS[:2]:
            params = {"dtype": dtype, "algorithm": algorithm}
            # With low_latency no rank reads operands of its peers.
            largest = max(rows * hidden for rows, hidden in _NORM_SHAPES)
            num_staged = 0 if algorithm == "low_latency" else 4 * largest
            ops = frozenset({_NORM_OP, "all_gather"})
            yield Check(norms, ops, params, num_staged=num_staged)
    for check_vma in (True, False):
        for outside in (True, False):
            how = {"check_vma": check_vma, "outside": outside}
            for op in _STOCK:
                yield Check(
                    reduction_gradients, frozenset({op}), {"op": op, **how}, uses_stock=True
                )
            yield Check(
                norm_gradients, frozenset({_NORM_OP}), how, num_staged=4 * 4 * 24, uses_stock=True
            )


CHECKS = tuple(_checks())
FULL = CHECKS
