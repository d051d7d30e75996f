"""overlap changes where a computation runs, never its value or its gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_ep
from jax_ep.testing.ranks import make_mesh, on_ranks

R = 2


@pytest.fixture(scope="module")
def group():
    with jax_ep.Group.open(make_mesh(R), "ep", name="overlap") as opened:
        yield opened


def _layer(group, shared, x, w, ids):
    out = jax_ep.dispatch(x, ids, group=group, num_experts=4 * R)
    return jax_ep.combine(2 * out.x, out.handle) + shared(x, w)


@pytest.mark.parametrize("check_vma", [True, False])
def test_value_and_gradient_are_those_of_the_function(group, check_vma):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((R, 6, 8), np.float32)
    w = rng.standard_normal((R, 8, 8), np.float32)
    ids = rng.integers(0, 4 * R, (R, 6, 2), np.int32)

    def shared(x, w):
        return jnp.tanh(x @ w)

    def run(shared):
        def loss(x, w, ids):
            return jnp.sum(_layer(group, shared, x, w, ids) ** 2)

        grads = jax.value_and_grad(loss, argnums=(0, 1))
        return on_ranks(
            lambda *own: jax.tree.map(jnp.atleast_1d, grads(*own)), group.mesh, check_vma=check_vma
        )(x, w, ids)

    for got, expected in zip(
        jax.tree.leaves(run(jax_ep.overlap(shared))), jax.tree.leaves(run(shared)), strict=True
    ):
        np.testing.assert_array_equal(got, expected)


def test_several_results_keep_their_structure(group):
    x = np.arange(R * 4.0, dtype=np.float32).reshape(R, 4)
    fn = jax_ep.overlap(lambda x: {"a": x + 1, "b": (x * 2,)})
    got = on_ranks(fn, group.mesh)(x)
    np.testing.assert_array_equal(got["a"], x + 1)
    np.testing.assert_array_equal(got["b"][0], x * 2)
