"""Operations in loops, on NVIDIA GPUs: pytest -m gpu. XLA must make each call once."""

import re
from collections import Counter
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_ep
from jax_ep.testing.ranks import make_mesh, on_ranks, place

pytestmark = pytest.mark.gpu
STEPS, TOKENS, TOPK, HIDDEN, PER_RANK = 4, 8, 2, 256, 2


@pytest.fixture(scope="module")
def group():
    mesh = make_mesh(len(jax.devices("gpu")))
    with jax_ep.Group.open(
        mesh, "ep", name="loops", timeout=60.0, in_flight_bytes=8 << 20
    ) as opened:
        yield opened


def _exchange(group, x, ids):
    sizes = {"group": group, "num_experts": PER_RANK * group.num_ranks}
    out = jax_ep.dispatch(x, ids, **sizes, num_sms=8)
    back = jax_ep.combine(out.x, out.handle, num_sms=8)
    few = jax_ep.low_latency_dispatch(x, ids, **sizes, max_tokens_per_rank=TOKENS)
    y = jax_ep.low_latency_combine(few.x, few.handle)
    total = jax_ep.all_reduce(back, group=group)
    normed, residual = jax_ep.all_reduce_residual_rmsnorm(
        back, x, jnp.ones(HIDDEN, x.dtype), group=group, eps=1e-6
    )
    moved = jax_ep.all_to_all_v(
        x, jnp.full(group.num_ranks, 2, jnp.int32), recv_capacity=TOKENS, group=group
    )
    filled = jnp.where(out.handle.recv_src[:, None] >= 0, out.x, 0)
    return filled, back, y, total, normed, residual, moved.x


CALLS = {
    "dispatch": 2,
    "combine": 2,
    "all_reduce": 1,
    "all_reduce_residual_rmsnorm": 1,
    "ragged_all_to_all": 1,
}


def _count(compiled):
    return Counter(re.findall(r'custom_call_target="jax_ep\.(\w+)"', compiled.as_text()))


def test_results_that_a_loop_stacks_and_uses_are_made_once(group):
    """Slices of operands come from stacks, too, as in a scan over layers."""

    def scanned(x, ids):
        def body(carry, step):
            results = _exchange(group, *step)
            for result in results:
                carry = carry + jnp.sum(result, axis=0, dtype=jnp.float32)
            return carry, results

        carry = jnp.zeros_like(x[0, 0], jnp.float32)
        return jax.lax.scan(body, carry, (x, ids))

    rng = np.random.default_rng(0)
    num_ranks = group.num_ranks
    x = rng.standard_normal((num_ranks, STEPS, TOKENS, HIDDEN)).astype(jnp.bfloat16)
    ids = rng.integers(0, PER_RANK * num_ranks, (num_ranks, STEPS, TOKENS, TOPK), np.int32)
    own = place((x, ids), group.mesh)
    looped = jax.jit(on_ranks(scanned, group.mesh, check_vma=False)).lower(*own).compile()
    assert _count(looped) == CALLS
    stacked = jax.tree.map(np.asarray, looped(*own)[1])
    alone = jax.jit(on_ranks(lambda *step: _exchange(group, *step), group.mesh, check_vma=False))
    for i in range(STEPS):
        expected = alone(*place((x[:, i], ids[:, i]), group.mesh))
        for got, wanted in zip(stacked, expected, strict=True):
            np.testing.assert_array_equal(
                got[:, i].view(np.uint8), np.asarray(wanted).view(np.uint8)
            )
    group.check()


def test_residuals_of_a_scan_over_layers_cost_no_exchange(group):
    """The backward pass of the scan reads what the forward pass has stacked."""
    num_experts = PER_RANK * group.num_ranks

    def loss(x, w, ids):
        def layer(x, w):
            out = jax_ep.dispatch(x, ids, num_experts=num_experts, group=group)
            rows = jnp.where(out.handle.recv_src[:, None] >= 0, out.x, 0)
            return x + jax_ep.combine(jnp.tanh(rows @ w), out.handle), None

        return jnp.sum(jax.lax.scan(layer, x, w)[0].astype(jnp.float32) ** 2)

    rng = np.random.default_rng(1)
    num_ranks = group.num_ranks
    own = place(
        (
            rng.standard_normal((num_ranks, TOKENS, HIDDEN)).astype(np.float32),
            rng.standard_normal((num_ranks, STEPS, HIDDEN, HIDDEN)).astype(np.float32) / 16,
            rng.integers(0, num_experts, (num_ranks, TOKENS, TOPK), np.int32),
        ),
        group.mesh,
    )
    step = on_ranks(jax.grad(loss, argnums=(0, 1)), group.mesh, check_vma=False)
    compiled = jax.jit(step).lower(*own).compile()
    # Forwards one of each; backwards the gradient of each, which the other's kernels make.
    assert sum(_count(compiled).values()) == 4
    for gradient in compiled(*own):
        assert np.isfinite(np.asarray(gradient)).all()
    group.check()


def _stack(exchange, *stacks):
    return jax.lax.scan(lambda carry, step: (carry, exchange(*step)), 0, stacks)[1]


def test_halves_over_slices_of_stacks_are_made_once(group):
    """XLA keeps a call that is not pure beside its fusion with a slice, unless it sees none."""
    sizes = {
        "group": group,
        "num_experts": PER_RANK * group.num_ranks,
        "max_tokens_per_rank": TOKENS,
    }

    def halved(x, ids):
        sent = jax_ep.low_latency_dispatch_send(x, ids, through=x, **sizes)
        out = jax_ep.low_latency_dispatch_recv(sent, after=sent.through)
        rows = jnp.where(out.handle.recv_src[:, None] >= 0, out.x, 0)
        back = jax_ep.low_latency_combine_send(rows, out.handle, through=rows)
        y = jax_ep.low_latency_combine_recv(back, after=back.through)
        return rows, y, out.group_sizes, sent.through, back.through

    def whole(x, ids):
        out = jax_ep.low_latency_dispatch(x, ids, **sizes)
        rows = jnp.where(out.handle.recv_src[:, None] >= 0, out.x, 0)
        return rows, jax_ep.low_latency_combine(rows, out.handle), out.group_sizes, x, rows

    rng = np.random.default_rng(2)
    num_ranks = group.num_ranks
    own = place(
        (
            rng.standard_normal((num_ranks, STEPS, TOKENS, HIDDEN)).astype(jnp.bfloat16),
            np.argsort(rng.random((num_ranks, STEPS, TOKENS, PER_RANK * num_ranks)), axis=-1)[
                ..., :TOPK
            ].astype(np.int32),
        ),
        group.mesh,
    )
    results = []
    for exchange in (halved, whole):
        step = on_ranks(partial(_stack, exchange), group.mesh, check_vma=False)
        compiled = jax.jit(step).lower(*own).compile()
        assert set(_count(compiled).values()) == {1}
        results.append(jax.tree.map(np.asarray, compiled(*own)))
        group.check()
    for got, wanted in zip(*results, strict=True):
        np.testing.assert_array_equal(got.view(np.uint8), wanted.view(np.uint8))
