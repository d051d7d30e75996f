"""ragged_all_to_all: transforms, types, errors. The suite checks values."""

import re
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import jax_ep
from jax_ep import reference
from jax_ep._src.base import limits
from jax_ep._src.base.options import Layout
from jax_ep.testing.compare import assert_close, assert_same_bits
from jax_ep.testing.conformance.ragged import side_by_side, with_gaps
from jax_ep.testing.ranks import make_mesh, on_ranks

NUM_RANKS, NUM_ROWS, NUM_PLACES = 3, 60, 75


def make_operands(width=4, seed=0, per_peer=2):
    """Makes operand, output and table for all ranks."""
    rng = np.random.default_rng(seed)
    operand, output = (
        rng.standard_normal((NUM_RANKS, rows, width)).astype(np.float32)
        for rows in (NUM_ROWS, NUM_PLACES)
    )
    return operand, output, with_gaps(rng, NUM_RANKS, per_peer)


def test_the_example_of_jax(groups, backend):
    """The two calls in the docstring of jax.lax.ragged_all_to_all."""
    group = groups(2)
    rows = np.array([[1, 2, 2], [3, 4, 0]], np.int32)
    table = [[[0, 1], [0, 1]], [[1, 2], [1, 1]], [[0, 0], [1, 2]], [[1, 1], [2, 1]]]
    table = np.array(table, np.int32)
    exchange = partial(jax_ep.ragged_all_to_all, axis_name="ep", backend=backend)
    got = on_ranks(exchange, group.mesh)(rows, np.zeros((2, 4), np.int32), *table)
    assert_same_bits(got, np.array([[1, 3, 0, 0], [2, 2, 4, 0]], np.int32))


@pytest.mark.parametrize("shape", [(), (1,), (2, 3, 2)])
def test_any_trailing_shape(groups, backend, shape):
    group = groups(NUM_RANKS)
    _, _, table = make_operands()
    rng = np.random.default_rng(1)
    operand, output = (
        rng.integers(0, 2**15, (NUM_RANKS, rows, *shape)).astype(np.int16)
        for rows in (NUM_ROWS, NUM_PLACES)
    )
    exchange = partial(jax_ep.ragged_all_to_all, axis_name=group, backend=backend)
    got = on_ranks(exchange, group.mesh)(operand, output, *table)
    assert_same_bits(got, reference.ragged_all_to_all(operand, output, table))


def test_an_output_that_is_still_used_is_not_written_over(groups, backend):
    """Neither if it is the operand itself, nor in a second call, nor if it is returned."""
    group = groups(NUM_RANKS)
    operand, _, table = make_operands()
    exchange = partial(jax_ep.ragged_all_to_all, axis_name=group, backend=backend)

    def fn(x, *table):
        doubled = x * 2
        return exchange(doubled, doubled, *table), exchange(x, doubled, *table), doubled

    mapped = on_ranks(fn, group.mesh)
    expected = [reference.ragged_all_to_all(x, operand * 2, table) for x in (operand * 2, operand)]
    for _ in range(2):
        first, second, doubled = mapped(operand, *table)
        assert_same_bits(first, expected[0])
        assert_same_bits(second, expected[1])
        assert_same_bits(doubled, operand * 2)
    if backend == "cpu":
        eager = on_ranks(exchange, group.mesh, jit=False)
        assert_same_bits(eager(operand * 2, operand * 2, *table), expected[0])


def make_dense(table):
    """Makes the exchange of all ranks' arrays in plain jnp, for jax.grad."""
    rows = np.arange(NUM_RANKS * NUM_ROWS, dtype=np.int32).reshape(NUM_RANKS, NUM_ROWS)
    nowhere = np.full((NUM_RANKS, NUM_PLACES), -1, np.int32)
    source = reference.ragged_all_to_all(rows, nowhere, table)

    def exchange(x, output):
        moved = x.reshape(-1, *x.shape[2:])[np.maximum(source, 0)]
        return jnp.where(source[..., None] >= 0, moved, output)

    return exchange


def test_gradients_equal_those_of_a_dense_formulation(groups, backend):
    """The same under jax.checkpoint, and in a scan whose steps use the results of one another."""
    group = groups(NUM_RANKS)
    operand, output, table = make_operands()
    exchange = partial(jax_ep.ragged_all_to_all, axis_name=group, backend=backend)

    def loss(exchange, x, output, *table):
        @partial(jax.checkpoint, prevent_cse=False)
        def step(x, output):
            return jnp.sin(exchange(jnp.cos(x), output, *table))

        def body(output, _):
            return step(x, output), None

        return jnp.sum(jax.lax.scan(body, output, length=3)[0] ** 2)

    grad = jax.grad(loss, argnums=(1, 2))
    bars = on_ranks(partial(grad, exchange), group.mesh)(operand, output, *table)
    expected = grad(make_dense(table), operand, output)
    for got, wanted in zip(bars, expected, strict=True):
        assert_close(got, np.asarray(wanted), tolerance=1e-5)


def test_a_gradient_exchanges_no_metadata(groups):
    group = groups(NUM_RANKS)
    operand, output, table = make_operands()

    def loss(x, output, *table):
        return jnp.sum(jax_ep.ragged_all_to_all(x, output, *table, axis_name=group) ** 2)

    grad = jax.jit(on_ranks(jax.grad(loss, argnums=(0, 1)), group.mesh, jit=False))
    text = grad.lower(operand, output, *table).as_text()
    calls = re.findall(r"@jax_ep\.\w+|stablehlo\.(?:all|collective)_\w+", text)
    assert calls == ["@jax_ep.ragged_all_to_all"] * 2


def test_a_call_and_its_gradient_have_the_budget_that_is_asked_for(groups):
    """The default is the group's, of a dispatch along a handle."""
    group = groups(NUM_RANKS)
    operand, output, table = make_operands()

    def budgets(**options):
        def loss(x, output, *table):
            y = jax_ep.ragged_all_to_all(x, output, *table, axis_name=group, **options)
            return jnp.sum(y**2)

        grad = on_ranks(jax.grad(loss), group.mesh, jit=False)
        text = str(jax.make_jaxpr(grad)(operand, output, *table))
        return re.findall(r"num_sms=(\d+)", text)

    default = group.budgets.of["cached_dispatch"][Layout.RANK].sms
    assert budgets() == [str(default)] * 2
    assert budgets(num_sms=default + 1) == [str(default + 1)] * 2


def test_results_are_kept_by_the_policy(groups):
    group = groups(NUM_RANKS)
    operand, output, table = make_operands()

    def loss(x, output, *table):
        y = jax_ep.ragged_all_to_all(jnp.sin(x), output, *table, axis_name=group)
        return jnp.sum(jnp.sin(y))

    def num_calls(**options):
        grad = jax.grad(jax.checkpoint(loss, **options))
        text = str(jax.make_jaxpr(on_ranks(grad, group.mesh, jit=False))(operand, output, *table))
        return len(re.findall(r"jax_ep\.ragged_all_to_all\[", text))

    assert num_calls() == 3
    assert num_calls(policy=jax_ep.save_communication_policy()) == 2


def test_batches_have_the_bits_of_a_loop(groups, backend):
    group = groups(NUM_RANKS)
    batch = [make_operands(seed=seed) for seed in range(3)]
    operand, table = (
        jax.tree.map(lambda *a: np.stack(a, axis=1), *(b[i] for b in batch)) for i in (0, 2)
    )
    output = batch[0][1]
    exchange = partial(jax_ep.ragged_all_to_all, axis_name=group, backend=backend)

    def bar(x, output, *table):
        y, back = jax.vjp(lambda x: exchange(x, output, *table), x)
        return y, back(y)[0]

    mapped = jax.vmap(bar, in_axes=(0, None, 0, 0, 0, 0))
    y, bars = on_ranks(mapped, group.mesh)(operand, output, *table)
    for i, (x, _, one) in enumerate(batch):
        expected = reference.ragged_all_to_all(x, output, one)
        assert_same_bits(np.asarray(y)[:, i], expected)
        wanted, _ = reference.ragged_all_to_all_gradient(expected, NUM_ROWS, one)
        assert_same_bits(np.asarray(bars)[:, i], wanted)


@pytest.mark.parametrize("dtype", [np.int8, np.uint32, np.int64])
def test_metadata_of_any_integer_dtype(groups, backend, dtype):
    """Numbers that int32 cannot hold stay out of range."""
    group = groups(NUM_RANKS)
    operand, output, table = make_operands()
    wide = [a.astype(dtype) for a in table]
    if dtype != np.int8:
        wide[0][:, 0] = 2**32 - 1 if dtype == np.uint32 else 2**32
        table[0][:, 0] = -1
    exchange = partial(jax_ep.ragged_all_to_all, axis_name=group, backend=backend)
    with jax.enable_x64(dtype == np.int64):
        got = on_ranks(exchange, group.mesh)(operand, output, *wide)
    assert_same_bits(got, reference.ragged_all_to_all(operand, output, table))


def test_arrays_without_elements_are_returned(groups, backend):
    group = groups(NUM_RANKS)
    operand, output, table = make_operands()
    exchange = partial(jax_ep.ragged_all_to_all, axis_name=group, backend=backend)
    grad = on_ranks(jax.grad(lambda *args: jnp.sum(exchange(*args))), group.mesh)
    for rows, places, width in ((0, 5, 4), (5, 0, 4), (5, 5, 0)):
        x, out = operand[:, :rows, :width], output[:, :places, :width]
        assert_same_bits(on_ranks(exchange, group.mesh)(x, out, *table), out)
        assert_same_bits(grad(x, out, *table), np.zeros_like(x))


def _call(group, **changes):
    """Traces a call on one rank with some arguments changed."""
    operand, output, table = make_operands()
    names = ("input_offsets", "send_sizes", "output_offsets", "recv_sizes")
    named = dict(zip(("operand", "output", *names), (operand, output, *table), strict=True))
    named = {name: a[0] for name, a in named.items()}
    named["axis_name"] = group
    named |= changes
    mapped = jax.shard_map(
        lambda: jax_ep.ragged_all_to_all(**named), mesh=group.mesh, in_specs=(), out_specs=P("ep")
    )
    return jax.eval_shape(mapped)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"send_sizes": np.ones(6)}, jax_ep.DTypeError, "send_sizes must be of integer type"),
        ({"recv_sizes": np.ones((6, 1), int)}, jax_ep.ShapeError, "recv_sizes must be rank 1"),
        ({"input_offsets": np.ones(0, int)}, jax_ep.ShapeError, "positive dimension size"),
        ({"output_offsets": np.ones(3, np.int32)}, jax_ep.ShapeError, r"must have shape \(6,\)"),
        (
            {
                n: np.ones(4, np.int32)
                for n in ("input_offsets", "send_sizes", "output_offsets", "recv_sizes")
            },
            jax_ep.ShapeError,
            "multiple of num_ranks=3, got 4",
        ),
        ({"operand": np.ones((60, 4), np.int8)}, jax_ep.DTypeError, "output.* must be int8"),
        ({"operand": np.float32(1)}, jax_ep.ShapeError, r"operand must be \[N, ...\]"),
        ({"output": np.ones((75, 5), np.float32)}, jax_ep.ShapeError, "equal shapes but for"),
        ({"output": np.ones((75, 4), jnp.int4)}, jax_ep.DTypeError, "whole bytes, got int4"),
        ({"axis_index_groups": [[0], [1, 2]]}, jax_ep.ConfigError, "axis_index_groups is not"),
        ({"backend": "tpu"}, jax_ep.ConfigError, "backend must be one of"),
        ({"num_sms": 0}, jax_ep.ConfigError, "num_sms must be at least 1"),
        ({"axis_name": "tokens"}, jax_ep.GroupError, "axis 'tokens' there are 0 at all: none"),
        ({"axis_name": None}, jax_ep.GroupError, "group is missing"),
    ],
)
def test_errors_name_the_argument(groups, changes, error, message):
    with pytest.raises(error, match=rf"^ragged_all_to_all: .*{message}"):
        _call(groups(NUM_RANKS), **changes)


def test_a_call_outside_of_shard_map_is_refused(groups):
    operand, output, table = make_operands()
    with pytest.raises(jax_ep.GroupError, match=r"call it inside jax\.shard_map"):
        jax_ep.ragged_all_to_all(operand[0], output[0], *table, axis_name=groups(NUM_RANKS))


def test_forward_mode_is_refused(groups, backend):
    group = groups(NUM_RANKS)
    operand, output, table = make_operands()
    exchange = partial(jax_ep.ragged_all_to_all, axis_name=group, backend=backend)

    def tangent(x, output, *table):
        return jax.jvp(lambda x: exchange(x, output, *table), (x,), (x,))

    with pytest.raises(TypeError, match="forward-mode"):
        on_ranks(tangent, group.mesh)(operand, output, *table)


def test_a_name_stands_for_the_only_group_along_it():
    """Groups over other meshes do not count; of two over this one, none is taken."""
    mesh = Mesh(np.array(jax.devices()[:6]).reshape(2, 3), ("data", "expert"))
    operand, output, table = make_operands()
    stacked = [np.stack([a, a]) for a in (operand, output, *table)]

    def run():
        def per_rank(*args):
            args = (a[0, 0] for a in args)
            return jax_ep.ragged_all_to_all(*args, axis_name=("expert",))[None, None]

        spec = P("data", "expert")
        mapped = jax.shard_map(per_rank, mesh=mesh, in_specs=spec, out_specs=spec)
        return jax.jit(mapped)(*stacked)

    expected = reference.ragged_all_to_all(operand, output, table)
    with (
        jax_ep.Group.open(mesh, "expert"),
        jax_ep.Group.open(make_mesh(4, "expert"), "expert"),
    ):
        assert_same_bits(run(), np.stack([expected] * 2))
        with (
            jax_ep.Group.open(mesh, "expert", name="other"),
            pytest.raises(jax_ep.GroupError, match=r"there are 2 .*: expert-.*, other-"),
        ):
            run()


@pytest.mark.parametrize(
    ("num_pieces", "staging_bytes", "is_ours"),
    [(limits.MAX_PIECES, None, True), (limits.MAX_PIECES + 2, None, False), (2, 1 << 9, False)],
)
def test_calls_too_large_for_the_kernel_take_stock_collectives(
    groups, monkeypatch, num_pieces, staging_bytes, is_ours
):
    """Such are large tables, and operands without room to be staged. Only `cuda` has limits."""
    group = groups(2)
    table = side_by_side(np.random.default_rng(0), 2, num_pieces // 2)
    shapes = [jax.ShapeDtypeStruct((2, n), jnp.int32) for n in (NUM_ROWS, NUM_PLACES)]
    shapes += [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in table]
    monkeypatch.setitem(group.backends, "cuda", group.backends["cpu"])
    monkeypatch.setattr(group, "spec", replace(group.spec, staging_bytes=staging_bytes))
    exchange = partial(jax_ep.ragged_all_to_all, axis_name=group, backend="cuda")
    text = str(jax.make_jaxpr(on_ranks(exchange, group.mesh, jit=False))(*shapes))
    assert ("jax_ep.ragged_all_to_all" in text) == is_ours
    assert ("all_gather" in text) != is_ours
