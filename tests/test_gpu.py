"""On NVIDIA GPUs: JAX_PLATFORMS=cuda,cpu pytest -m gpu."""

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

import jax_ep
from jax_ep.testing import conformance
from jax_ep.testing.conformance.layouts import get_dispatch_layout
from jax_ep.testing.ranks import on_ranks

pytestmark = pytest.mark.gpu

# Back ends that must pass the whole suite.
COMPLETE = ("xla",)


@pytest.fixture(scope="module")
def group():
    mesh = Mesh(np.array(jax.devices("gpu")), ("ep",))
    with jax_ep.Group.open(mesh, "ep", name="gpu", timeout=120.0) as opened:
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


@pytest.mark.parametrize("backend", COMPLETE)
@pytest.mark.parametrize("check", conformance.CHECKS, ids=str)
def test_conformance(group, backend, check):
    assert check.not_usable(group, backend) is None
    check(group, backend)


@pytest.mark.parametrize("backend", ["cuda", "xla"])
@pytest.mark.parametrize("experts_per_rank", [4, 128, 8192], ids=lambda n: f"{n}_experts")
@pytest.mark.parametrize("num_tokens", [1, 257, 3000])
def test_get_dispatch_layout(group, backend, num_tokens, experts_per_rank):
    """Small and large counters, in shared memory and beyond it, in a captured loop."""
    sizes = {"num_tokens": num_tokens, "num_topk": 4, "experts_per_rank": experts_per_rank}
    get_dispatch_layout(group, backend, **sizes)
