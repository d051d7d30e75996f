"""Group.open and check at every place of a program: while JAX traces, under other meshes."""

import contextlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P
from steps import make_echo

import jax_ep
from jax_ep.testing.compare import assert_same_bits
from jax_ep.testing.ranks import make_mesh, on_ranks

NUM_RANKS = 4
X = np.arange(NUM_RANKS * 4 * 8, dtype=np.float32).reshape(NUM_RANKS, 4, 8)
IDS = np.arange(NUM_RANKS * 4, dtype=np.int32).reshape(NUM_RANKS, 4, 1) % NUM_RANKS
MESH = make_mesh(NUM_RANKS)
OTHER = Mesh(np.array(jax.devices()[2:8]).reshape(2, 3), ("a", "b"))
EXPLICIT = Mesh(MESH.devices, ("ep",), axis_types=(AxisType.Explicit,))
MANUAL = Mesh(MESH.devices, ("ep",), axis_types=(AxisType.Manual,))

# Callers of a function with any number of arguments; a caller may call it several times.
Caller = Callable[[Callable[[], None]], object]


def _tracing(transform) -> Caller:
    def call(fn):
        def traced(x):
            fn()
            return x

        return transform(traced)

    return call


def _under(make_context) -> Caller:
    def call(fn):
        with make_context():
            fn()

    return call


def _body(mesh, axis, *, jit=True, over=P) -> Caller:
    def run(fn):
        step = jax.shard_map(fn, mesh=mesh, in_specs=over(axis), out_specs=over(axis))
        return (jax.jit(step) if jit else step)(np.ones(6 * NUM_RANKS, np.float32))

    return _tracing(run)


def _disabled_body(fn):
    with jax.disable_jit():
        _body(MESH, "ep")(fn)


PLACES: dict[str, Caller] = {
    "jit": _tracing(lambda fn: jax.jit(fn)(1.0)),
    "grad": _tracing(lambda fn: jax.grad(fn)(1.0)),
    "vmap": _tracing(lambda fn: jax.vmap(fn)(jnp.ones(3))),
    "eval_shape": _tracing(lambda fn: jax.eval_shape(fn, 1.0)),
    "scan": _tracing(lambda fn: jax.lax.scan(lambda c, _: (fn(c), None), 1.0, length=2)),
    "checkpoint": _tracing(lambda fn: jax.grad(jax.checkpoint(fn))(1.0)),
    "shard_map": _body(MESH, "ep"),
    "shard_map of another mesh": _body(OTHER, "a"),
    "eager shard_map": _body(MESH, "ep", jit=False),
    "set_mesh": _under(lambda: jax.set_mesh(MESH)),
    "set_mesh of another mesh": _under(lambda: jax.set_mesh(OTHER)),
    "set_mesh of an explicit mesh": _under(lambda: jax.set_mesh(EXPLICIT)),
    "abstract mesh": _under(lambda: jax.sharding.use_abstract_mesh(OTHER.abstract_mesh)),
    "disable_jit": _under(jax.disable_jit),
    "shard_map without jit": _disabled_body,
    "no transfers": _under(lambda: jax.transfer_guard("disallow_explicit")),
    "another default device": _under(lambda: jax.default_device(jax.devices()[7])),
    "x64": _under(lambda: jax.enable_x64(True)),
    "leaks": _under(jax.checking_leaks),
}


def _open_once(mesh, backend, place) -> jax_ep.Group:
    opened: list[Any] = []

    def fn():
        if not opened:
            opened.append(jax_ep.Group.open(mesh, "ep", backend=backend))

    with contextlib.ExitStack() as undo:
        undo.callback(lambda: [group.close() for group in opened])
        PLACES[place](fn)
        undo.pop_all()
    return opened[0]


@pytest.fixture(scope="module")
def step():
    """Runs a compiled function with the open group of its mesh and axis."""
    with jax_ep.Group.open(MESH, "ep", backend="cpu") as group:
        # jit would trace again under other settings of JAX, so the program is compiled here.
        return on_ranks(make_echo(group), MESH).lower(X, IDS).compile()


@pytest.mark.parametrize("place", PLACES)
def test_a_group_opens_wherever_it_is_called(place, step):
    """The group also opens again, and a function that was compiled before runs with it."""
    with _open_once(MESH, "cpu", place):
        assert_same_bits(step(X, IDS), X)


@pytest.mark.parametrize("place", ["jit", "shard_map", "disable_jit"])
def test_a_group_on_xla_opens_wherever_it_is_called(place):
    with _open_once(MESH, "xla", place) as group:
        assert_same_bits(on_ranks(make_echo(group), MESH)(X, IDS), X)


@pytest.mark.parametrize("mesh", [EXPLICIT, MANUAL], ids=["explicit", "manual"])
@pytest.mark.parametrize("place", ["set_mesh of another mesh", "shard_map"])
def test_a_group_opens_over_axes_of_every_type(mesh, place, step):
    with _open_once(mesh, "cpu", place) as group:
        assert group.mesh is mesh
        assert_same_bits(step(X, IDS), X)


@pytest.mark.parametrize(
    ("context", "jit"), [("argument", False), ("set_mesh", True)], ids=["argument", "set_mesh"]
)
def test_operations_run_over_an_explicit_mesh(context, jit, backend):
    with jax_ep.Group.open(EXPLICIT, "ep", backend=backend) as group:

        def fn(x, ids):
            y = make_echo(group)(x[0], ids[0])
            return jax_ep.all_reduce(y, group=group)[None]

        place = jax.NamedSharding(EXPLICIT, P("ep"))
        args = jax.device_put((X, IDS), place)
        is_set = context == "set_mesh"
        with jax.set_mesh(EXPLICIT) if is_set else contextlib.nullcontext():
            step = jax.shard_map(
                fn, mesh=None if is_set else EXPLICIT, in_specs=P("ep"), out_specs=P("ep")
            )
            y = (jax.jit(step) if jit else step)(*args)
        np.testing.assert_allclose(y, np.broadcast_to(X.sum(0), X.shape), rtol=1e-6)


def test_operations_without_jit_give_the_same_values(groups, layout, backend):
    """Values and gradients under jax.disable_jit() equal those under jit."""
    group = groups(NUM_RANKS)

    def fn(x, ids):
        def loss(x):
            out = jax_ep.dispatch(
                x, ids, group=group, num_experts=NUM_RANKS, layout=layout, recv_capacity=16,
                backend=backend,
            )  # fmt: skip
            y = jax_ep.combine(out.x, out.handle, backend=backend)
            return jnp.sum(jnp.square(jax_ep.all_reduce(y, group=group)))

        return jax.value_and_grad(loss)(x)

    expected = on_ranks(fn, group.mesh)(X, IDS)
    with jax.disable_jit():
        got = on_ranks(fn, group.mesh)(X, IDS)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.parametrize("place", ["jit", "shard_map of another mesh", "disable_jit"])
def test_check_waits_wherever_it_is_called(groups, monkeypatch, place):
    """check waits for the arrays and random keys that it is given, and skips tracers."""
    group, waited = groups(2), []
    block = jax.block_until_ready
    monkeypatch.setattr(
        jax, "block_until_ready", lambda found: waited.extend(found) or block(found)
    )
    key = jax.random.key(0)
    PLACES[place](lambda: group.check(key))
    assert len(waited) >= 1
    assert not any(isinstance(array, jax.core.Tracer) for array in waited)
