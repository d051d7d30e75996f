"""JAX's transforms and control flow: values and gradients stay the same."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import serialize_executable
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jax_ep
from jax_ep.testing.cases import Case, assert_combined, dispatch, make_data, plan_of
from jax_ep.testing.compare import assert_same_bits
from jax_ep.testing.ranks import make_mesh, on_ranks

NUM_RANKS = 4


def _case(layout):
    return Case(NUM_RANKS, layout, weights_at=None if layout == "rank" else "rows")


def _args(data):
    return data.x, data.topk_idx, data.topk_weights, data.rows


def _step(case, group, backend):
    """Makes (x, ids, weights, rows) -> combined, on one rank."""

    def step(x, ids, weights, rows):
        out = dispatch(case, group, backend, x, ids, weights)
        w = None if case.layout == "rank" else out.weights
        return jax_ep.combine(rows, out.handle, weights=w, backend=backend)

    return step


@pytest.mark.parametrize("check_vma", [True, False], ids=["vma", "no_vma"])
def test_cond_while_and_scan_give_the_same_values(groups, layout, backend, check_vma):
    """Operands do not change in the loops, and the predicate is equal on all ranks."""
    group, case = groups(NUM_RANKS), _case(layout)
    step, data = _step(case, group, backend), make_data(case, "skewed")

    def fn(x, ids, weights, rows):
        args = (x, ids, weights, rows)
        taken = jax.lax.cond(jnp.int32(3) > 2, lambda: step(*args), lambda: step(*args) * 0)

        def body(state):
            i, _ = state
            return i + 1, step(*args)

        start = jnp.zeros_like(taken)
        _, looped = jax.lax.while_loop(lambda state: state[0] < 3, body, (0, start))
        _, scanned = jax.lax.scan(lambda c, _: (c, step(*args)), 0, length=3)
        return taken, looped, scanned[2]

    for y in on_ranks(fn, group.mesh, check_vma=check_vma)(*_args(data)):
        assert_combined(case, data, plan_of(case, data.topk_idx), y)


@pytest.mark.parametrize("outside", [True, False], ids=["outside", "inside"])
def test_value_and_grad_equals_the_two_apart(groups, layout, backend, outside):
    """The value has the bits of the forward pass; the gradient equals that of jax.grad alone."""
    group, case = groups(NUM_RANKS), Case(NUM_RANKS, layout, dtype="f32")
    data = make_data(case, "balanced")
    step = _step(case, group, backend)

    def loss(rows, x, ids, weights):
        return jnp.sum(jnp.sin(step(x, ids, weights, rows)))

    args = (data.rows, data.x, data.topk_idx, data.topk_weights)
    if outside:
        losses = on_ranks(loss, group.mesh)
        (value, grad) = jax.value_and_grad(lambda *a: losses(*a).sum())(*args)
        assert value == pytest.approx(np.asarray(losses(*args)).sum(), rel=1e-6)
    else:
        value, grad = on_ranks(jax.value_and_grad(loss), group.mesh)(*args)
        assert_same_bits(value, on_ranks(loss, group.mesh)(*args))
    expected = on_ranks(jax.grad(loss), group.mesh)(*args)
    np.testing.assert_allclose(grad, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("policy", "num_dispatches"),
    [(jax_ep.save_communication_policy(), 1), (None, 2)],
    ids=["saved", "recomputed"],
)
def test_remat_policy_saves_communication(groups, layout, policy, num_dispatches):
    """The backward pass repeats the forward exchange without the policy, but not with it."""
    group, case = groups(NUM_RANKS), Case(NUM_RANKS, layout, dtype="f32")
    data = make_data(case, "balanced")

    def layer(x, ids, weights):
        out = dispatch(case, group, "cpu", x, ids, weights)
        w = None if layout == "rank" else out.weights
        return jax_ep.combine(jnp.sin(out.x), out.handle, weights=w, backend="cpu")

    def loss(x, ids, weights):
        return jnp.sum(jnp.sin(jax.checkpoint(layer, policy=policy)(jnp.cos(x), ids, weights)))

    grad = on_ranks(jax.grad(loss), group.mesh)
    args = (data.x, data.topk_idx, data.topk_weights)
    text = grad.lower(*args).as_text()
    assert len(re.findall(r"stablehlo\.custom_call @jax_ep\.dispatch\(", text)) == num_dispatches
    plain = on_ranks(
        jax.grad(lambda *a: jnp.sum(jnp.sin(layer(jnp.cos(a[0]), *a[1:])))), group.mesh
    )
    np.testing.assert_allclose(grad(*args), plain(*args), rtol=1e-5, atol=1e-6)


def test_an_export_finds_its_group(groups, layout):
    """An export that is serialised and loaded finds its group by identity when it is called."""
    case = _case(layout)
    data = make_data(case, "skewed")
    mesh = make_mesh(NUM_RANKS)
    sharding = NamedSharding(mesh, P("ep"))
    args = jax.device_put(_args(data), sharding)
    with jax_ep.Group.open(mesh, "ep", name="exported") as group:
        fn = on_ranks(_step(case, group, "cpu"), mesh)
        exported = jax.export.export(fn, disabled_checks=jax_ep.export_safety_checks())(*args)
        blob = exported.serialize()
        loaded = jax.export.deserialize(blob)
        y = jax.jit(loaded.call)(*args)
        assert_combined(case, data, plan_of(case, data.topk_idx), y)
        identity = group.identity
    with pytest.raises(jax.errors.JaxRuntimeError, match=rf"group {identity} is not open"):
        jax.jit(jax.export.deserialize(blob).call)(*args)
    with jax_ep.Group.open(mesh, "ep", name="exported"):
        y = jax.jit(jax.export.deserialize(blob).call)(*args)
        assert_combined(case, data, plan_of(case, data.topk_idx), y)


def test_export_without_the_safety_checks_is_refused(groups):
    group = groups(NUM_RANKS)
    case = _case("rank")
    fn = on_ranks(_step(case, group, "cpu"), group.mesh)
    args = jax.device_put(_args(make_data(case, "balanced")), NamedSharding(group.mesh, P("ep")))
    with pytest.raises(ValueError, match=r"jax_ep\.dispatch"):
        jax.export.export(fn)(*args)


def test_a_serialised_executable_gives_the_same_values(groups, layout):
    case = _case(layout)
    data = make_data(case, "skewed")
    group = groups(NUM_RANKS)
    devices = list(group.mesh.devices.flat)
    args = jax.device_put(_args(data), NamedSharding(group.mesh, P("ep")))
    compiled = on_ranks(_step(case, group, "cpu"), group.mesh).lower(*args).compile()
    assert_combined(case, data, plan_of(case, data.topk_idx), compiled(*args))
    saved, in_tree, out_tree = serialize_executable.serialize(compiled)
    again = serialize_executable.deserialize_and_load(
        saved, in_tree, out_tree, execution_devices=devices
    )
    assert_combined(case, data, plan_of(case, data.topk_idx), again(*args))


def test_donated_operands_are_not_overwritten(groups, layout, backend):
    """Peers read the operands of a call, so no result takes the memory of an operand."""
    case = Case(NUM_RANKS, "rank", recv_capacity=12)  # rows of the same shape as x
    case = case if layout == "rank" else Case(NUM_RANKS, layout, recv_capacity=12)
    group = groups(NUM_RANKS)
    sharding = NamedSharding(group.mesh, P("ep"))

    def step(x, ids, weights):
        out = dispatch(case, group, backend, x, ids, weights)
        return jax_ep.combine(out.x, out.handle, backend=backend)

    donated = jax.jit(on_ranks(step, group.mesh), donate_argnums=0)
    plain = on_ranks(step, group.mesh)
    for seed in range(20):
        data = make_data(case, "balanced", seed)
        rest = jax.device_put((data.topk_idx, data.topk_weights), sharding)
        expected = np.asarray(plain(data.x, *rest))
        x = jax.device_put(data.x, sharding)
        assert_same_bits(donated(x, *rest), expected)
        assert x.is_deleted()


def test_forward_mode_is_refused(groups, layout):
    """JAX refuses it, as for every function with its own reverse rule."""
    group, case = groups(NUM_RANKS), Case(NUM_RANKS, layout, dtype="f32")
    data = make_data(case, "balanced")

    def fn(x, ids):
        return jax.jvp(lambda x: dispatch(case, group, "cpu", x, ids).x, (x,), (x,))[1]

    with pytest.raises(TypeError, match=r"can't apply forward-mode .* custom_vjp"):
        on_ranks(fn, group.mesh)(data.x, data.topk_idx)


def test_one_compilation_serves_many_routings(groups, layout):
    case, group = _case(layout), groups(NUM_RANKS)
    fn = on_ranks(_step(case, group, "cpu"), group.mesh)
    for seed in range(3):
        fn(*_args(make_data(case, "balanced", seed)))
    assert fn._cache_size() == 1
