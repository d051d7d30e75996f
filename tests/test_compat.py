"""jax_ep.compat: programs that name jax.lax's functions run with ours."""

import re
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from steps import dense_expert_layer, make_expert_layer

import jax_ep
from jax_ep import compat
from jax_ep.testing.compare import assert_close
from jax_ep.testing.ranks import on_ranks

NUM_RANKS, NUM_EXPERTS, TOPK, TOKENS, HIDDEN = 4, 8, 2, 12, 16
STOCK = jax.lax.ragged_all_to_all


def make_layer_operands():
    rng = np.random.default_rng(0)
    lead = (NUM_RANKS, TOKENS)
    x = rng.standard_normal((*lead, HIDDEN)).astype(np.float32)
    ids = np.argsort(rng.random((*lead, NUM_EXPERTS)), axis=-1)[..., :TOPK].astype(np.int32)
    weights = rng.random((*lead, TOPK)).astype(np.float32)
    kernels = rng.standard_normal((NUM_EXPERTS, HIDDEN, HIDDEN)).astype(np.float32)
    return x, ids, weights, kernels / np.float32(HIDDEN)


def test_a_layer_on_the_function_of_jax_runs_with_its_gradient(groups):
    """On CPUs, where JAX has none: values and gradients of the layer equal those of a dense one."""
    group = groups(NUM_RANKS)
    layer = make_expert_layer(NUM_RANKS, NUM_EXPERTS, TOPK, "ep")
    x, ids, weights, kernels = make_layer_operands()

    def loss(x, weights, kernels, ids, layer):
        y = layer(x, ids, weights, kernels)
        return jnp.sum(jnp.sin(y)), y

    grad = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)
    expected, y = grad(x, weights, kernels, ids, dense_expert_layer)
    own = kernels.reshape(NUM_RANKS, -1, HIDDEN, HIDDEN)
    mapped = on_ranks(lambda *args: grad(*args, layer), group.mesh)
    with compat.use_ragged_all_to_all(group):
        bars, got = mapped(x, weights, own, ids)
    assert_close(got, np.asarray(y), tolerance=1e-5)
    for bar, wanted in zip(bars, expected, strict=True):
        assert_close(bar, np.asarray(wanted).reshape(bar.shape), tolerance=1e-5)
    # What was compiled in the block runs behind it. Anything else is JAX's again.
    mapped(x, weights, own, ids)
    assert jax.lax.ragged_all_to_all is STOCK


def trace(mesh, axis):
    """Returns the primitives by which a call along an axis goes."""
    numbers = np.zeros(mesh.shape[axis], np.int32)

    def call():
        x = jnp.zeros(4)
        return jax.lax.ragged_all_to_all(x, x, *[numbers] * 4, axis_name=axis)

    mapped = jax.shard_map(call, mesh=mesh, in_specs=(), out_specs=P(), check_vma=False)
    return set(re.findall(r"(?:jax_ep\.)?ragged_all_to_all(?=\[)", str(jax.make_jaxpr(mapped)())))


def test_the_innermost_group_along_the_axes_counts():
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("a", "b"))
    ours, stock = {"jax_ep.ragged_all_to_all"}, {"ragged_all_to_all"}
    with jax_ep.Group.open(mesh, "a") as a, jax_ep.Group.open(mesh, "b") as b:
        with compat.use_ragged_all_to_all(a):
            assert (trace(mesh, "a"), trace(mesh, "b")) == (ours, stock)
            with compat.use_ragged_all_to_all(b), compat.use_ragged_all_to_all(a):
                assert (trace(mesh, "a"), trace(mesh, "b")) == (ours, ours)
            assert (trace(mesh, "a"), trace(mesh, "b")) == (ours, stock)
        assert trace(mesh, "a") == stock

        @compat.use_ragged_all_to_all(b)
        def decorated():
            return trace(mesh, "b")

        assert decorated() == ours
    assert jax.lax.ragged_all_to_all is STOCK


def test_blocks_of_two_threads_may_end_in_any_order(groups):
    """And a block that an exception leaves ends like any other."""
    entered, leave = threading.Event(), threading.Event()

    def other():
        with compat.use_ragged_all_to_all(groups(2)):
            entered.set()
            leave.wait(30)

    thread = threading.Thread(target=other)

    def start_and_raise():
        thread.start()
        assert entered.wait(30)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), compat.use_ragged_all_to_all(groups(NUM_RANKS)):
        start_and_raise()
    assert trace(groups(2).mesh, "ep") == {"jax_ep.ragged_all_to_all"}
    leave.set()
    thread.join()
    assert jax.lax.ragged_all_to_all is STOCK


def test_a_name_is_refused():
    with (
        pytest.raises(jax_ep.GroupError, match=r"group must be a jax_ep\.Group, got str"),
        compat.use_ragged_all_to_all("ep"),
    ):
        pass
