"""Low-latency operations that leave ranks out; the conformance suite compares their values."""

import re
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoding import NUM_RANKS, TOKENS, inputs, send
from process_programs import has_passed, run_on_cpus

import jax_ep
from jax_ep.testing.ranks import make_mesh, on_ranks

pytestmark = pytest.mark.dealt

ALONE = np.array([True, False])


@pytest.fixture(scope="module")
def group():
    with jax_ep.Group.open(make_mesh(NUM_RANKS), "ep", name="masks") as opened:
        yield opened


def _masked(group, x, ids, weights=None, mask=ALONE, **options):
    return send(group, x, ids, weights, rank_mask=jnp.asarray(mask), **options)


@pytest.mark.parametrize("backend", ["cpu", "xla"])
def test_a_rank_alone_computes_its_own_experts(group, backend):
    """Rank 0 gets what its own experts make of its tokens; rank 1, which is left out, gets zero."""

    def run(x, ids, weights):
        out = _masked(group, x, ids, weights, backend=backend)
        y, mask = jax_ep.low_latency_combine(
            out.x, out.handle, weights=out.weights, return_rank_mask=True, backend=backend
        )
        return y, mask, out.rank_mask, out.num_recv

    x, ids, weights = inputs()
    y, *masks, num_recv = on_ranks(run, group.mesh)(x, ids, weights)
    own = np.where(ids < 2, weights, 0).sum(axis=-1, keepdims=True) * x
    own[1] = 0
    np.testing.assert_allclose(y, own, rtol=1e-5, atol=1e-6)
    for mask in masks:
        np.testing.assert_array_equal(mask, [ALONE, ALONE])
    assert num_recv[:, 0].tolist() == [(ids[0] < 2).sum(), 0]


def test_a_mask_may_change_from_call_to_call(group):
    """The mask is an operand: one compiled program serves all masks."""

    traced = []

    def run(x, ids, mask):
        traced.append(mask)
        out = _masked(group, x, ids, mask=mask)
        return jax_ep.low_latency_combine(out.x, out.handle)

    x, ids, _ = inputs()
    step = jax.jit(on_ranks(run, group.mesh))
    whole = on_ranks(lambda x, i: _plain(group, x, i), group.mesh)(x, ids)
    for mask in ([True, True], [True, False], [False, True], [False, False]):
        y = np.asarray(step(x, ids, np.tile(mask, (NUM_RANKS, 1))))
        assert np.array_equal(y, whole) == all(mask)
        assert [bool(np.any(rank)) for rank in y] == mask
    assert len(traced) == 1


def _plain(group, x, ids):
    out = send(group, x, ids)
    assert out.rank_mask is None
    return jax_ep.low_latency_combine(out.x, out.handle)


def test_a_batch_shares_the_mask(group):
    def step(x, ids):
        out = _masked(group, x, ids)
        return jax_ep.low_latency_combine(out.x, out.handle)

    x, ids, _ = (np.stack(a, axis=1) for a in zip(inputs(0), inputs(1), strict=True))
    batched = on_ranks(jax.vmap(step), group.mesh)(x, ids)
    for i in range(2):
        alone = on_ranks(step, group.mesh)(x[:, i], ids[:, i])
        np.testing.assert_array_equal(batched[:, i], alone)


def test_gradients_are_refused(group):
    x, ids, _ = inputs()

    def loss(rows):
        out = _masked(group, x[0], ids[0])
        return jnp.sum(jax_ep.low_latency_combine(out.x * rows, out.handle))

    with pytest.raises(jax_ep.ConfigError, match="low_latency_combine cannot be differentiated"):
        on_ranks(jax.grad(loss), group.mesh)(np.ones((NUM_RANKS,), np.float32))


WRONG_MASKS = {
    "shape": (np.ones(3, bool), "rank_mask must have shape (2,), got (3,)"),
    "dtype": (np.ones(2, np.int32), "rank_mask must be bool, got int32"),
}


@pytest.mark.parametrize("name", WRONG_MASKS)
def test_wrong_masks_are_refused(group, name):
    mask, message = WRONG_MASKS[name]
    x, ids, _ = inputs()
    with pytest.raises(jax_ep.JaxEpError, match=re.escape(message)):
        on_ranks(lambda x, i: _masked(group, x, i, mask=mask).x, group.mesh)(x, ids)


USES_OF_A_MASKED_HANDLE = {
    "combine": (lambda x, w, h: jax_ep.combine(x, h), "only low_latency_combine takes it"),
    "combine_weights": (
        lambda x, w, h: jax_ep.combine_weights(x[:, 0], h),
        "only low_latency_combine takes it",
    ),
    "dispatch": (
        lambda x, w, h: jax_ep.dispatch(x[:TOKENS], handle=h).x,
        "only low_latency_combine takes it",
    ),
    "weights": (
        lambda x, w, h: jax_ep.low_latency_combine(x, h, weights=w),
        "weights must be at the rows",
    ),
}


@pytest.mark.parametrize("name", USES_OF_A_MASKED_HANDLE)
def test_what_needs_all_ranks_refuses_the_handle(group, name):
    use, message = USES_OF_A_MASKED_HANDLE[name]

    def run(x, ids, weights):
        out = _masked(group, x, ids)
        return use(out.x, weights, out.handle)

    with pytest.raises(jax_ep.ConfigError, match=message):
        on_ranks(run, group.mesh)(*inputs())


@pytest.mark.parametrize(
    ("given", "message"),
    [(True, "return_rank_mask needs the handle of"), (1, "return_rank_mask must be True or False")],
)
def test_a_mask_is_returned_only_if_there_is_one(group, given, message):
    def run(x, ids):
        out = send(group, x, ids)
        return jax_ep.low_latency_combine(  # type: ignore[call-overload]
            out.x, out.handle, return_rank_mask=given
        )

    x, ids, _ = inputs()
    with pytest.raises(jax_ep.ConfigError, match=message):
        on_ranks(run, group.mesh)(x, ids)


def test_a_handle_with_a_wrong_mask_is_refused(group):
    def run(x, ids):
        out = _masked(group, x, ids)
        leaves, structure = jax.tree.flatten(out.handle)
        wrong = [jnp.ones(3, bool) if a.dtype == bool else a for a in leaves]
        return jax_ep.low_latency_combine(out.x, jax.tree.unflatten(structure, wrong))

    x, ids, _ = inputs()
    with pytest.raises(jax_ep.ShapeError, match=re.escape("handle.rank_mask must have shape (2,)")):
        on_ranks(run, group.mesh)(x, ids)


def test_a_group_that_survives_has_no_loss(monkeypatch):
    with jax_ep.Group.open(make_mesh(NUM_RANKS), "ep", name="survivor", survives=True) as group:
        assert group.survives
        info = group.info()
        assert info.survives
        assert info.left_out == ()
        monkeypatch.setattr(group._rendezvous, "lost_process", lambda: 7)
        assert group._failures.loss() is None
        assert jax_ep.Group.get(group.mesh, "ep", name="survivor", survives=True) is group
        with pytest.raises(jax_ep.GroupError, match="survives=True, wanted False"):
            jax_ep.Group.get(group.mesh, "ep", name="survivor", survives=False)


def test_survives_is_true_or_false():
    with pytest.raises(jax_ep.ConfigError, match="survives must be True or False, got 1"):
        jax_ep.Group.open(make_mesh(NUM_RANKS), "ep", survives=1)


def test_a_process_that_survives_ends_without_the_other():
    """JAX's own shutdown would wait for the lost process until its heartbeats are missed."""
    codes = [0, -signal.SIGKILL]
    outputs = run_on_cpus("survives_a_loss", devices=1, deadline=60.0, exit_codes=codes)
    assert has_passed(outputs[0])
