"""recv_capacity: enough rows for the worst case, and never more than its bound."""

import numpy as np
import pytest

import jax_ep
from jax_ep import reference
from jax_ep.testing import routing as routings


@pytest.mark.parametrize("routing", routings.BY_NAME)
@pytest.mark.parametrize("layout", ["rank", "expert"])
@pytest.mark.parametrize("alignment", [1, 8])
def test_the_worst_case_never_drops(routing, layout, alignment):
    alignment = 1 if layout == "rank" else alignment
    sizes = {"num_tokens": 7, "num_topk": 5, "num_experts": 12, "num_ranks": 4}
    capacity = jax_ep.recv_capacity(
        **sizes, layout=layout, expert_alignment=alignment, balance=None
    )
    ids = routings.BY_NAME[routing](np.random.default_rng(0), (4, 7, 5), 12)
    plan = reference.make_plan(
        ids, num_experts=12, layout=layout, recv_capacity=capacity, expert_alignment=alignment
    )
    assert plan.num_dropped.sum() == 0
    assert capacity % alignment == 0
    tight = jax_ep.recv_capacity(**sizes, layout=layout, expert_alignment=alignment, balance=100.0)
    assert tight == capacity


def test_balance_scales_the_expected_rows():
    sizes = {"num_tokens": 4096, "num_topk": 8, "num_experts": 256, "num_ranks": 8}
    assert jax_ep.recv_capacity(**sizes, balance=None) == 4096 * 8 * 8
    assert jax_ep.recv_capacity(**sizes, balance=1.25) == 4096 * 8 * 1.25
    assert jax_ep.recv_capacity(**sizes, balance=np.float32(1.25)) == 4096 * 8 * 1.25
    assert jax_ep.recv_capacity(**sizes, balance=1.0, expert_alignment=128) == 36864
    assert jax_ep.recv_capacity(**sizes, layout="rank", balance=None) == 4096 * 8
    # A token reaches 5.29 of 8 ranks on average.
    rank = jax_ep.recv_capacity(**sizes, layout="rank", balance=1.0)
    assert rank == pytest.approx(4096 * 5.29, rel=1e-2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_tokens": 0}, "num_tokens must be at least 1, got 0"),
        ({"num_experts": 9}, "num_experts must be a multiple of num_ranks=4, got 9"),
        ({"balance": 0}, "balance must be a static positive number, got 0"),
        ({"balance": float("nan")}, "balance must be a static positive number, got nan"),
        ({"balance": True}, "balance must be a static positive number, got True"),
        ({"num_tokens": 8.5}, "num_tokens must be a static integer, got 8.5"),
        (
            {"layout": "rank", "expert_alignment": 8},
            "expert_alignment needs layout='expert', got 8",
        ),
        ({"layout": "flat"}, "layout must be one of 'rank', 'expert', got 'flat'"),
    ],
)
def test_bad_input_is_refused_by_name(change, message):
    sizes = {"num_tokens": 8, "num_topk": 2, "num_experts": 8, "num_ranks": 4} | change
    with pytest.raises(jax_ep.ConfigError, match=f"recv_capacity: {message}"):
        jax_ep.recv_capacity(**sizes)
