"""ragged_all_to_all on NVIDIA GPUs: JAX_PLATFORMS=cuda,cpu pytest -m gpu."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from steps import dense_expert_layer, make_expert_layer

import jax_ep
from jax_ep import compat, reference
from jax_ep.testing.compare import assert_close, assert_same_bits
from jax_ep.testing.conformance.ragged import swap
from jax_ep.testing.ranks import make_mesh, on_group, on_ranks

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def group():
    mesh = make_mesh(len(jax.devices()))
    with jax_ep.Group.open(mesh, "ep", name="ragged", timeout=60.0) as opened:
        yield opened


@pytest.mark.parametrize("per_peer", [1, 3, 120])
def test_large_arrays_arrive_whole(group, per_peer):
    """In a captured loop, whose steps use the results of one another; peers get unequal shares."""
    num_ranks = group.num_ranks
    num_pieces = num_ranks * per_peer
    rng = np.random.default_rng(per_peer)
    most = 2 * 4096 // num_pieces
    sizes = rng.integers(0, most + 1, (num_ranks, num_pieces)).astype(np.int32)
    recv_sizes = swap(sizes)
    first = (np.cumsum(sizes, axis=1) - sizes).astype(np.int32)
    places = (np.cumsum(recv_sizes, axis=1) - recv_sizes).astype(np.int32)
    table = first, sizes, swap(places), recv_sizes
    shape = (num_ranks, most * num_pieces, 1024)
    x = rng.integers(0, 2**15, shape).astype(np.int16)

    def run(x, *table):
        exchange = partial(jax_ep.ragged_all_to_all, axis_name=group)
        return jax.lax.scan(lambda x, _: (exchange(x, x, *table), None), x, length=3)[0]

    expected = x
    for _ in range(3):
        expected = reference.ragged_all_to_all(expected, expected, table)
    assert_same_bits(on_group(run, group)(x, *table), expected)


def test_a_layer_on_the_function_of_jax_runs_with_its_gradient(group):
    num_ranks, topk, hidden = group.num_ranks, 2, 256
    num_experts = 4 * num_ranks
    rng = np.random.default_rng(0)
    x = rng.standard_normal((num_ranks, 300, hidden)).astype(np.float32)
    ids = np.argsort(rng.random((num_ranks, 300, num_experts)), axis=-1)[..., :topk]
    ids, weights = ids.astype(np.int32), rng.random(ids.shape).astype(np.float32)
    kernels = rng.standard_normal((num_experts, hidden, hidden)).astype(np.float32) / 16
    layer = make_expert_layer(num_ranks, num_experts, topk, "ep")

    def loss(x, weights, kernels, ids, layer):
        return jnp.sum(jnp.sin(layer(x, ids, weights, kernels)))

    grad = jax.grad(loss, argnums=(0, 1, 2))
    own = kernels.reshape(num_ranks, 4, hidden, hidden)
    with jax.default_matmul_precision("highest"):
        with compat.use_ragged_all_to_all(group):
            bars = on_ranks(lambda *args: grad(*args, layer), group.mesh)(x, weights, own, ids)
        expected = jax.jit(partial(grad, layer=dense_expert_layer))(x, weights, kernels, ids)
    for bar, wanted in zip(bars, expected, strict=True):
        assert_close(bar, np.asarray(wanted).reshape(bar.shape), tolerance=1e-4)
