"""The benchmark of the all_reduce family: its chains, and its floor."""

import numpy as np
import pytest

from jax_ep import reference
from jax_ep.bench import floor, reduce
from jax_ep.bench.shapes import make_reduce_point
from jax_ep.testing.compare import assert_close, assert_same_bits
from jax_ep.testing.ranks import on_ranks, place


def _reduce_point(op, num_bytes=4096, hidden=256):
    return make_reduce_point(op, num_bytes, dtype="f32", hidden=hidden)


def _run_chain(group, op, run, operands, *, steps=3, unroll=False):
    chain = reduce.make_chain(op, run, steps, group.num_ranks, unroll=unroll)
    return on_ranks(chain, group.mesh, check_vma=False)(operands)


@pytest.mark.parametrize("op", reduce.OPS)
def test_chain_of_sums_computes_the_operation(groups, op):
    """Every contender computes the timed operation; the empty chain makes only the passes."""
    group, point = groups(4), _reduce_point(op)
    rng = np.random.default_rng(0)
    start = [rng.standard_normal(a.shape, np.float32) for a in reduce.start(point, group)]
    operands = place(tuple(start), group.mesh)
    us, other, stock = reduce.contenders(point, group, ["cpu", "xla"])
    assert (us.name, us.backend, other.backend) == ("jax_ep", "cpu", "xla")
    x = start[0]
    steps = {
        "all_reduce": (lambda x: reference.all_reduce(x) / 4, lambda x: x / 4),
        "reduce_scatter": (
            lambda x: np.repeat(reference.reduce_scatter(x)[:, None] / 4, 4, axis=1),
            lambda x: np.repeat(x[:, :1] / 4, 4, axis=1),
        ),
        "all_gather": (lambda x: -reference.all_gather(x)[:, 0], lambda x: -x),
    }
    if op in steps:
        expected, nothing = x, x
        for _ in range(3):
            expected, nothing = (f(a) for f, a in zip(steps[op], (expected, nothing), strict=True))
        expected, nothing = (expected,), (nothing,)
    else:
        expected, nothing = start, (x / 64, *start[1:])
        for _ in range(3):
            normed, h = reference.all_reduce_residual_rmsnorm(*expected, eps=1e-6)
            expected = (normed / 4, h, start[2])
    for contender in (us, other, stock):
        got = _run_chain(group, op, contender.run, operands)
        for g, e in zip(got, expected, strict=True):
            assert_close(g, e, tolerance=1e-5, what=contender.name)
    for unroll in (False, True):
        got = _run_chain(group, op, None, operands, unroll=unroll)
        for g, e in zip(got, nothing, strict=True):
            assert_same_bits(g, e)


@pytest.mark.parametrize("op", reduce.OPS)
def test_every_call_of_a_chain_is_made(groups, op):
    """XLA hoists nothing out of a loop; an unrolled chain has as many collectives as steps."""
    group, point = groups(2), _reduce_point(op)
    (stock,) = reduce.contenders(point, group, [], None)
    collective = {"psum": " all-reduce(", "psum_scatter": " reduce-scatter("}
    name = collective.get(stock.name, " all-gather(")
    for unroll in (False, True):
        chain = reduce.make_chain(op, stock.run, 4, 2, unroll=unroll)
        mapped = on_ranks(chain, group.mesh, check_vma=False)
        text = mapped.lower(reduce.start(point, group)).compile().as_text()
        entry = text[text.index("\nENTRY ") :].partition("\n}")[0]
        assert entry.count(name) == (4 if unroll else 0)
        assert text.count(name) == (4 if unroll else 1)


def test_contenders_carry_only_their_sizes(groups, monkeypatch):
    group = groups(2)

    def names(op, *args, hidden=256, backends=("cpu",)):
        point = _reduce_point(op, 1 << 17, hidden=hidden)
        found = reduce.contenders(point, group, backends, *args)
        return [(c.name, c.algorithm) for c in found]

    # On CPUs all algorithms of jax_ep are the same.
    assert names("all_reduce") == [("jax_ep", "one_shot"), ("psum", None)]
    assert names("all_gather", ["two_shot"]) == []
    # XLA normalises rows of more than 64 KiB.
    norm = "all_reduce_residual_rmsnorm"
    assert names(norm, hidden=1 << 15) == [("psum", None)]
    assert make_reduce_point(norm, 1 << 10, dtype="f32", hidden=512) is None
    flag = "--xla_gpu_experimental_use_collective_kernels="
    for flags, algorithm in (("", "nccl"), ("allreduce", None)):
        monkeypatch.setenv("XLA_FLAGS", f"--xla_a=1 {flag}{flags} --xla_b=2")
        assert names("all_reduce", ["psum"]) == [("psum", algorithm)]


# Two ranks have two tokens and two experts each: tokens 0, 1 are on rank 0, tokens 2, 3 on rank 1.
# Token 0 has both experts of rank 1, token 1 one of each rank, token 2 one of rank 1, token 3 one
# of rank 0.


def test_floors_of_sums_count_bytes_right():
    size = 4096
    expected = {
        # Bytes for four ranks, in units of one array: wire, read, written.
        "all_reduce": (1.5, 1, 1),
        "reduce_scatter": (3, 4, 1),
        "all_gather": (3, 4, 4),
        "all_reduce_residual_rmsnorm": (1.5, 2.25, 2),  # one row is a quarter of the array
    }
    assert set(expected) == set(reduce.OPS)
    for op, arrays in expected.items():
        moved = floor.reduce_traffic(_reduce_point(op, size), 4)
        got = (moved.wire, moved.read, moved.written)
        np.testing.assert_array_equal(np.array(got), np.array([[a * size] * 4 for a in arrays]))
    moved = floor.reduce_traffic(_reduce_point("all_reduce", size), 2)
    wire = size / floor.NVLINK_BYTES_PER_S
    assert floor.gpu_floor_us(moved) == pytest.approx(1e6 * wire)
    assert floor.cpu_floor_us(moved, 1e6) == pytest.approx(2 * size)
    alone = floor.reduce_traffic(_reduce_point("all_reduce", size), 1)
    assert floor.gpu_floor_us(alone) == pytest.approx(1e6 * size / floor.HBM_COPY_BYTES_PER_S)
