"""get_dispatch_layout on groups of several nodes; the conformance suite has one node."""

import pytest

import jax_ep
from jax_ep.testing.conformance.layouts import get_dispatch_layout
from jax_ep.testing.ranks import make_mesh


@pytest.mark.parametrize(("num_ranks", "ranks_per_node"), [(1, 1), (3, 1), (6, 2), (8, 4), (8, 8)])
def test_counts_match_the_reference(backend, num_ranks, ranks_per_node):
    with jax_ep.Group.open(
        make_mesh(num_ranks), "ep", name="nodes", ranks_per_node=ranks_per_node
    ) as group:
        get_dispatch_layout(group, backend, num_tokens=13, num_topk=3, experts_per_rank=4)
