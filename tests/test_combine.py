"""combine across back ends. The conformance suite checks its values."""

import jax.numpy as jnp
import numpy as np
import pytest

import jax_ep
from jax_ep.testing.cases import DTYPES, Case, assert_combined, make_data, plan_of
from jax_ep.testing.compare import assert_same_bits
from jax_ep.testing.ranks import on_ranks


def test_handles_are_valid_across_back_ends(groups, layout):
    """Each back end combines rows that the other one dispatched."""
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


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_operands_are_rounded_before_they_are_added(groups, backend, layout, dtype):
    """XLA does not fuse the computation of rows and biases into the sums."""
    group = groups(2)
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 8, (2, 16, 4)).astype(np.int32)
    factors = rng.standard_normal((2, 2, 128, 128)).astype(np.float32)

    def product(a, b):
        return (a * b).astype(DTYPES[dtype])

    def run(rows, bias, ids):
        x = jnp.zeros((16, 4))
        out = jax_ep.dispatch(
            x, ids, group=group, num_experts=8, layout=layout, recv_capacity=128, backend="xla"
        )
        return jax_ep.combine(rows, out.handle, bias=bias, backend=backend)

    fused = on_ranks(
        lambda a, b, ids: run(product(a, b), product(a[:16], b[16:32]), ids), group.mesh
    )
    # NumPy rounds each product.
    rows = np.multiply(*factors).astype(DTYPES[dtype])
    bias = (factors[0, :, :16] * factors[1, :, 16:32]).astype(DTYPES[dtype])
    assert_same_bits(fused(*factors, ids), on_ranks(run, group.mesh)(rows, bias, ids))
