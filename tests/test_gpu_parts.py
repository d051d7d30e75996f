"""dispatch of ranks that each hold the tokens of several sources, on NVIDIA GPUs."""

import jax
import numpy as np
import parts
import pytest
from jax.sharding import Mesh
from parts import Case

import jax_ep

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def group():
    mesh = Mesh(np.array(jax.devices("gpu")), ("ep",))
    with jax_ep.Group.open(mesh, "ep", name="parts", timeout=120.0) as opened:
        yield opened


# The capacity is enough, or ends in the last part or the first one.
@pytest.mark.parametrize("share", [2.0, 0.8, 0.3])
@pytest.mark.parametrize("layout", ["rank", "expert"])
@pytest.mark.parametrize("num_parts", [2, 3])
def test_rows_are_in_the_order_of_the_sources(group, num_parts, layout, share):
    num_tokens, num_ranks = 300, group.num_ranks
    each = parts.SHARE_OF_EXPERTS / num_ranks  # choices that lead to a rank
    is_expert_layout = layout == "expert"
    rows = parts.NUM_TOPK * each if is_expert_layout else 1 - (1 - each) ** parts.NUM_TOPK
    case = Case(
        layout,
        num_parts,
        num_tokens,
        recv_capacity=int(share * num_parts * num_ranks * num_tokens * rows),
        expert_alignment=8 if is_expert_layout else 1,
        hidden=256,
    )
    assert (parts.assert_in_order_of_sources(case, group, "cuda") > 0) == (share < 1)
