"""On NVIDIA GPUs: JAX_PLATFORMS=cuda,cpu pytest -m gpu."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import (
    ROUTINGS,
    Case,
    assert_combined,
    assert_dispatched,
    dispatch,
    make_data,
    plan_of,
    run,
)
from jax.sharding import Mesh

import jax_ep
from jax_ep import reference
from jax_ep.testing.compare import assert_same_bits
from jax_ep.testing.ranks import on_ranks

pytestmark = pytest.mark.gpu
LAYOUT_FIELDS = (
    "num_tokens_per_rank",
    "num_tokens_per_node",
    "num_tokens_per_expert",
    "is_token_in_rank",
)


@pytest.fixture(scope="module")
def group():
    mesh = Mesh(np.array(jax.devices("gpu")), ("ep",))
    with jax_ep.Group.open(mesh, "ep", name="gpu") as opened:
        yield opened


def test_info_tells_why(group):
    backends = group.info().backends
    assert group.backend == "xla"
    assert backends["cpu"] == "the mesh's devices are not CPU devices"
    assert backends["cuda"].startswith("usable for get_dispatch_layout only")
    with pytest.raises(jax_ep.GroupError, match="backend 'cuda' is not usable here: usable for"):
        on_ranks(
            lambda x, i: jax_ep.dispatch(x, i, group=group, num_experts=4, backend="cuda").x,
            group.mesh,
        )(np.ones((group.num_ranks, 4, 8), np.float32), np.zeros((group.num_ranks, 4, 1), np.int32))


def test_gradients_scan_and_checkpoint(group, layout):
    """Two layers under scan and remat, against the reference's gradient."""
    case = Case(group.num_ranks, layout, dtype=jnp.float32, hidden=64)
    data = make_data(case, "balanced")
    plan = plan_of(case, data)

    def loss(x, ids, weights):
        def layer(h, _):
            out = dispatch(case, group, "xla", h, ids, weights)
            w = None if layout == "rank" else out.weights
            return jnp.sin(jax_ep.combine(jnp.tanh(out.x), out.handle, weights=w)), None

        return jnp.sum(jax.lax.scan(jax.checkpoint(layer), x, length=2)[0])

    def expected(x, weights):
        w = None if layout == "rank" else reference.dispatch_weights(plan, weights)
        for _ in range(2):
            rows = jnp.tanh(reference.dispatch(plan, x))
            x = jnp.sin(reference.combine(plan, rows, w))
        return jnp.sum(x)

    grads = on_ranks(jax.grad(loss, argnums=(0, 2)), group.mesh)(
        data.x, data.topk_idx, data.topk_weights
    )
    with jax.default_device(jax.devices("cpu")[0]):
        wanted = jax.grad(expected, argnums=(0, 1))(
            jnp.asarray(data.x), jnp.asarray(data.topk_weights)
        )
    np.testing.assert_allclose(grads[0], wanted[0], atol=1e-4)
    if layout == "expert":
        np.testing.assert_allclose(grads[1], wanted[1], atol=1e-4)


@pytest.mark.parametrize("backend", ["cuda", "xla"])
@pytest.mark.parametrize("experts_per_rank", [4, 128, 8192], ids=lambda n: f"{n}_experts")
@pytest.mark.parametrize("num_tokens", [1, 257, 3000])
def test_get_dispatch_layout(group, backend, num_tokens, experts_per_rank):
    """Small and large counters, in shared memory and beyond it, in a captured loop."""
    num_experts = experts_per_rank * group.num_ranks

    def fn(ids):
        def step(shift, _):
            out = jax_ep.get_dispatch_layout(
                jnp.where(ids >= 0, (ids + shift) % num_experts, ids),
                num_experts=num_experts,
                group=group,
                backend=backend,
            )
            return shift + 1, out

        return jax.lax.scan(step, 0, length=3)[1]

    compiled = on_ranks(fn, group.mesh)
    for routing in ("balanced", "skewed", "masked", "all_empty"):
        ids = ROUTINGS[routing](
            np.random.default_rng(0), (group.num_ranks, num_tokens, 4), num_experts
        )
        for _ in range(3):
            out = compiled(ids)
        for step in range(3):
            shifted = np.where(ids >= 0, (ids + step) % num_experts, ids)
            expected = reference.get_dispatch_layout(
                shifted, num_experts=num_experts, ranks_per_node=group.ranks_per_node
            )
            for name, value in zip(LAYOUT_FIELDS, expected, strict=True):
                assert_same_bits(np.asarray(getattr(out, name))[:, step], value, what=name)


@pytest.mark.parametrize(
    "dtype", [jnp.bfloat16, jnp.float16, jnp.float32], ids=lambda d: d.__name__
)
@pytest.mark.parametrize("routing", ROUTINGS)
def test_stock_collectives_match_reference(group, layout, routing, dtype):
    weights_at = None if layout == "rank" else "rows"
    case = Case(
        group.num_ranks, layout, dtype=dtype, weights_at=weights_at, num_biases=2, hidden=512
    )
    data = make_data(case, routing)
    out, y = run(case, group, "xla", data)
    assert_combined(case, data, assert_dispatched(case, data, out), y)


def test_stock_collectives_keep_subnormals(group, layout):
    case = Case(group.num_ranks, layout, dtype=jnp.float32)
    data = make_data(case, "balanced")
    data.rows[:] *= np.finfo(np.float32).tiny / 4
    _, y = run(case, group, "xla", data)
    assert_combined(case, data, plan_of(case, data), y)
    assert np.any(np.asarray(y) != 0)
