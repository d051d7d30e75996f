"""jax.vmap and the names in errors on NVIDIA GPUs: JAX_PLATFORMS=cuda,cpu pytest -m gpu."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_ep
from jax_ep.testing.compare import assert_same_bits
from jax_ep.testing.ranks import make_mesh, on_ranks

pytestmark = pytest.mark.gpu


def _make_args(num_ranks, batch=3):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((num_ranks, batch, 64, 256)).astype(np.float32)
    ids = rng.integers(0, num_ranks, (num_ranks, batch, 64, 1)).astype(np.int32)
    return x, ids


def _send(group, x, ids, layout="rank"):
    return jax_ep.dispatch(
        x,
        ids,
        jnp.ones(ids.shape),
        group=group,
        num_experts=group.num_ranks,
        layout=layout,
        recv_capacity=64 * group.num_ranks,
    )


@pytest.mark.parametrize("layout", ["rank", "expert"])
def test_a_batch_gives_the_bits_of_a_loop(layout):
    mesh = make_mesh(len(jax.devices()))
    with jax_ep.Group.open(mesh, "ep", timeout=60.0) as group:

        def loss(x, ids):
            out = _send(group, jnp.sin(x), ids, layout)
            again = jax_ep.dispatch(x, handle=out.handle).x
            weights = None if layout == "rank" else jax.lax.stop_gradient(out.weights)
            y = jax_ep.combine(jnp.sin(out.x + again), out.handle, weights=weights)
            return jnp.sum(jnp.sin(y))

        def looped(x, ids):
            return jnp.stack([jax.grad(loss)(*each) for each in zip(x, ids, strict=True)])

        args = _make_args(group.num_ranks)
        expected = on_ranks(looped, mesh)(*args)
        assert np.any(np.asarray(expected))
        mapped = on_ranks(jax.vmap(jax.grad(loss)), mesh)
        for _ in range(3):
            assert_same_bits(mapped(*args), np.asarray(expected))


EXCHANGES = {
    "dispatch": lambda x, handle: jax_ep.dispatch(x, handle=handle).x,
    "combine": lambda x, handle: jax_ep.combine(
        jnp.tile(x, (handle.recv_capacity // x.shape[0], 1)), handle
    ),
    "combine_weights": lambda x, handle: jax_ep.combine_weights(
        jnp.tile(x[:, 0], handle.recv_capacity // x.shape[0]), handle
    ),
}


@pytest.mark.parametrize("is_gradient", [False, True], ids=["forward", "gradient"])
@pytest.mark.parametrize("op", EXCHANGES)
def test_failures_name_the_public_operation(op, is_gradient):
    num_ranks = len(jax.devices())
    if num_ranks < 2:
        pytest.skip("needs two GPUs")
    group = jax_ep.Group.open(make_mesh(num_ranks), "ep", name="public", timeout=1.0)
    x, ids = (a[:, 0] for a in _make_args(num_ranks))
    layout = "expert" if op == "combine_weights" else "rank"
    handle = on_ranks(lambda x, i: _send(group, x, i, layout).handle, group.mesh)(x, ids)
    call = on_ranks(EXCHANGES[op], group.mesh, check_vma=False)
    y, back = jax.vjp(lambda x: call(x, handle), x)
    run, arg = (back, y) if is_gradient else (lambda x: call(x, handle), x)
    group.check(run(arg))
    group._native_group.handle.skip_rank(1)
    results = run(arg)
    with pytest.raises(jax_ep.PeerTimeoutError, match="waited for rank 1") as caught:
        group.check(results)
    assert caught.value.op == (f"{op} (gradient)" if is_gradient else op)
    group.close()
