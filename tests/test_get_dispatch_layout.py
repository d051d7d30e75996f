"""get_dispatch_layout against the reference."""

import functools

import numpy as np
import pytest
from cases import ROUTINGS

import jax_ep
from jax_ep import reference
from jax_ep.testing.compare import assert_same_bits
from jax_ep.testing.ranks import make_mesh, on_ranks

FIELDS = ("num_tokens_per_rank", "num_tokens_per_node", "num_tokens_per_expert", "is_token_in_rank")


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize(("num_ranks", "ranks_per_node"), [(1, 1), (3, 1), (6, 2), (8, 4), (8, 8)])
def test_matches_reference(backend, num_ranks, ranks_per_node, routing):
    fn, num_experts = _compiled(num_ranks, ranks_per_node, backend)
    rng = np.random.default_rng(0)
    ids = ROUTINGS[routing](rng, (num_ranks, 13, 3), num_experts)
    expected = reference.get_dispatch_layout(
        ids, num_experts=num_experts, ranks_per_node=ranks_per_node
    )
    out = fn(ids)
    for name, value in zip(FIELDS, expected, strict=True):
        assert_same_bits(getattr(out, name), value, what=name)


@functools.cache
def _compiled(num_ranks, ranks_per_node, backend):
    num_experts = 4 * num_ranks
    mesh = make_mesh(num_ranks)
    with jax_ep.Group.open(
        mesh, "ep", name=f"nodes of {ranks_per_node}", ranks_per_node=ranks_per_node
    ) as group:
        fn = on_ranks(
            lambda ids: jax_ep.get_dispatch_layout(
                ids, num_experts=num_experts, group=group, backend=backend
            ),
            mesh,
        )
        fn(np.zeros((num_ranks, 13, 3), np.int32))  # traced while the group is open
    return fn, num_experts
