"""Groups with several nodes on NVIDIA GPUs of one host: pytest -m gpu."""

import functools

import jax
import numpy as np
import pytest
from steps import make_echo

import jax_ep
from jax_ep.testing import conformance
from jax_ep.testing.cases import Case, make_data, round_trip
from jax_ep.testing.compare import assert_same_bits
from jax_ep.testing.ranks import make_mesh, on_ranks

pytestmark = pytest.mark.gpu
OPS = {"dispatch", "combine", "combine_weights", "dispatch_fp8"}
ALL = [check for check in conformance.CHECKS if check.ops <= OPS]
TRIPS = [check for check in ALL if check.name.startswith("round_trip")]
CHECKS = [*TRIPS[::3], *(check for check in ALL if check not in TRIPS)]
SHORT = [check for check in ALL if "gradients_to_the_bit" in check.name]


def _num_gpus():
    return len(jax.devices("gpu"))


@pytest.fixture(scope="module")
def of_nodes():
    """of_nodes(ranks_per_node): returns a group over all GPUs, open for the whole module."""
    opened = []

    @functools.cache
    def get(ranks_per_node):
        name = f"nodes of {ranks_per_node}"
        mesh = make_mesh(_num_gpus())
        opened.append(
            jax_ep.Group.open(mesh, "ep", name=name, timeout=60.0, ranks_per_node=ranks_per_node)
        )
        return opened[-1]

    yield get
    for group in opened:
        group.check()
        group.close()


def _ranks_per_node(wanted):
    if _num_gpus() % wanted or _num_gpus() // wanted < 2:
        pytest.skip(f"{_num_gpus()} GPUs are not several nodes of {wanted}")
    return wanted


def test_info_names_the_transport(of_nodes):
    info = of_nodes(_ranks_per_node(1)).info()
    assert info.backend == "cuda"
    assert info.transport.startswith("mapped: ")
    assert info.transport.endswith("inside the nodes back end 'cuda'")
    assert "not by dispatch and combine" in info.low_latency


@pytest.mark.parametrize("check", CHECKS, ids=str)
def test_nodes_of_one_pass_the_suite(of_nodes, check):
    check(of_nodes(_ranks_per_node(1)), "cuda")


@pytest.mark.parametrize("check", SHORT, ids=str)
def test_nodes_of_one_pass_on_xla(of_nodes, check):
    check(of_nodes(_ranks_per_node(1)), "xla")


@pytest.mark.parametrize("check", [*SHORT, *CHECKS[::4]], ids=str)
def test_nodes_of_two_pass_the_suite(of_nodes, check):
    check(of_nodes(_ranks_per_node(2)), "cuda")


@pytest.mark.parametrize("layout", ["rank", "expert"])
@pytest.mark.parametrize("num_tokens", [16, 1000])
def test_results_are_those_of_a_flat_group(of_nodes, layout, num_tokens):
    """Small integers make sums exact, so the order of additions does not show.

    A flat group carries the few tokens by other kernels.
    """
    per_node = _ranks_per_node(1)
    weights_at = None if layout == "rank" else "rows"
    case = Case(
        _num_gpus(), layout, num_tokens, num_topk=8, hidden=1024, dtype="f32",
        weights_at=weights_at, num_biases=1,
    )  # fmt: skip
    data = make_data(case, "skewed")
    for array in (data.rows, *data.biases, data.topk_weights):
        array[:] = np.round(4 * array)
    with jax_ep.Group.open(make_mesh(_num_gpus()), "ep", name="flat", timeout=60.0) as flat:
        one = round_trip(case, flat, "cuda")(*data.operands())
    two = round_trip(case, of_nodes(per_node), "cuda")(*data.operands())
    for got, expected in zip(jax.tree.leaves(two), jax.tree.leaves(one), strict=True):
        assert_same_bits(got, np.asarray(expected))


@pytest.mark.parametrize(("part", "distance"), [(0, 1), (1, 2)])
def test_failures_of_parts_name_ranks_of_the_group(part, distance):
    per_node = _ranks_per_node(2)
    num_ranks = _num_gpus()
    x = np.ones((num_ranks, 4, 8), np.float32)
    ids = np.zeros((num_ranks, 4, 1), np.int32)
    group = jax_ep.Group.open(
        make_mesh(num_ranks), "ep", name="fails", timeout=2.0, ranks_per_node=per_node
    )
    step = on_ranks(make_echo(group), group.mesh)
    step(x, ids).block_until_ready()
    group.check()
    group.parts[part]._native_group.handle.skip_rank(1)
    with pytest.raises(jax_ep.PeerTimeoutError) as caught:
        group.check(step(x, ids))
    error = caught.value
    assert (error.peer - error.rank) % distance == 0
    assert error.peer in (range(1, num_ranks, 2) if part == 0 else range(2, 4))
    group.close()
