"""Gradients: types under check_vma, and refusals. The conformance suite checks values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import jax_ep
from jax_ep.testing.compare import assert_same_bits
from jax_ep.testing.ranks import on_ranks


def test_replicated_operands_get_summed_gradients(groups, backend):
    """Operands that are equal on all ranks are cast to varying, and their gradient is summed."""
    group = groups(4)
    x = np.random.default_rng(0).standard_normal((6, 8)).astype(np.float32)
    ids = np.arange(6, dtype=np.int32)[:, None] % 4

    def loss(x, ids):
        out = jax_ep.dispatch(x, ids, group=group, num_experts=4, backend=backend)
        return jax.lax.psum(jnp.sum(jax_ep.combine(out.x, out.handle, backend=backend) ** 2), "ep")

    sharded = jax.jit(jax.shard_map(loss, mesh=group.mesh, in_specs=P(), out_specs=P()))
    assert sharded(x, ids) == pytest.approx(4 * np.sum(x**2), rel=1e-5)
    grad = jax.grad(lambda x: sharded(x, ids))(x)
    np.testing.assert_allclose(grad, 8 * x, rtol=1e-5)


def test_results_vary_over_the_group_and_the_operands_only(backend):
    """Results are equal along an axis if the operands are, and JAX's types say so."""
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "ep"))
    with jax_ep.Group.open(mesh, "ep") as group:

        def fn(x, ids):
            out = jax_ep.dispatch(x, ids, group=group, num_experts=4, backend=backend)
            return jax_ep.combine(out.x, out.handle, backend=backend)

        fn = jax.jit(jax.shard_map(fn, mesh=mesh, in_specs=P("ep"), out_specs=P("ep")))
        x = np.arange(8 * 8, dtype=np.float32).reshape(8, 8)
        ids = np.arange(8, dtype=np.int32)[:, None] % 4
        assert_same_bits(fn(x, ids), x)


def test_unsupported_transforms_are_refused_by_name(groups, backend):
    group = groups(2)
    x, ids = np.ones((2, 4, 8), np.float32), np.zeros((2, 4, 1), np.int32)

    def fn(x, ids):
        return jax_ep.dispatch(x, ids, group=group, num_experts=2, backend=backend).x

    with pytest.raises(jax_ep.ConfigError, match="only first derivatives"):
        on_ranks(jax.hessian(lambda x, i: jnp.sum(fn(x, i) ** 2)), group.mesh)(x, ids)
