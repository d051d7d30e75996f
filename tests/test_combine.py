"""combine across back ends. Its values are in the conformance suite."""

import jax_ep
from jax_ep.testing.cases import Case, assert_combined, make_data, plan_of
from jax_ep.testing.compare import assert_same_bits
from jax_ep.testing.ranks import on_ranks


def test_handles_are_valid_across_back_ends(groups, layout):
    """What one back end dispatched, the other combines."""
    group = groups(4)
    case = Case(4, layout)
    data = make_data(case, "skewed")

    def fn(x, topk_idx, rows):
        ys = {}
        for there, back in (("cpu", "xla"), ("xla", "cpu")):
            out = jax_ep.dispatch(
                x, topk_idx, group=group, num_experts=case.num_experts, layout=layout,
                recv_capacity=case.capacity, backend=there,
            )  # fmt: skip
            ys[there] = jax_ep.combine(rows, out.handle, backend=back)
        return ys

    ys = on_ranks(fn, group.mesh)(data.x, data.topk_idx, data.rows)
    for y in ys.values():
        assert_combined(case, data, plan_of(case, data.topk_idx), y)
    assert_same_bits(ys["cpu"], ys["xla"])
