"""Calls that leave ranks out, on NVIDIA GPUs: JAX_PLATFORMS=cuda,cpu pytest -m gpu."""

import signal
import time

import jax
import numpy as np
import pytest
from process_programs import number_behind, path_of

import jax_ep
from jax_ep.testing import conformance, launch
from jax_ep.testing.conformance import rank_masks
from jax_ep.testing.ranks import make_mesh, on_ranks

pytestmark = pytest.mark.gpu
HIDDEN, TOPK, TOKENS, PER_RANK = 256, 4, 16, 8


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(len(jax.devices("gpu")))


@pytest.mark.parametrize("check", rank_masks.CHECKS, ids=str)
def test_masks_pass_the_suite(mesh, check):
    assert check in conformance.CHECKS
    with jax_ep.Group.open(mesh, "ep", name="to_mask", timeout=120.0) as group:
        check(group, "cuda")


def _inputs(num_ranks):
    rng = np.random.default_rng(0)
    x = rng.integers(-8, 9, (num_ranks, TOKENS, HIDDEN)).astype(np.float32)
    ids = rng.permuted(np.tile(np.arange(PER_RANK * num_ranks), (num_ranks, TOKENS, 1)), axis=-1)
    return x, ids[..., :TOPK].astype(np.int32)


def _step(group, layout):
    def run(x, ids, mask):
        out = jax_ep.low_latency_dispatch(
            x,
            ids,
            group=group,
            num_experts=PER_RANK * group.num_ranks,
            max_tokens_per_rank=TOKENS,
            layout=layout,
            rank_mask=mask,
        )
        y, after = jax_ep.low_latency_combine(out.x, out.handle, return_rank_mask=True)
        return y, after, out.rank_mask

    return on_ranks(run, group.mesh)


def _expected(x, ids, layout, living):
    """Returns x, once for each row that goes to a rank that is alive."""
    to = living[ids // PER_RANK]
    if layout == "rank":
        ranks = np.arange(len(living))
        to = ((ids // PER_RANK)[..., None] == ranks).any(axis=2) & living
    return x * to.sum(axis=-1, keepdims=True).astype(np.float32)


@pytest.mark.parametrize("layout", ["rank", "expert", "batched"])
def test_a_rank_that_does_not_answer_is_left_out(mesh, layout):
    """The others wait once, go on at once in all later steps, and the group has not failed."""
    num_ranks = mesh.size
    if num_ranks < 2:
        pytest.skip("needs two GPUs")
    x, ids = _inputs(num_ranks)
    masks = np.ones((num_ranks, num_ranks), bool)
    everyone, living = np.ones(num_ranks, bool), np.arange(num_ranks) != 1
    with jax_ep.Group.open(mesh, "ep", name="left_out", timeout=1.0) as group:
        step = _step(group, layout)
        for _ in range(3):
            y, *after = step(x, ids, masks)
            group.check()
            np.testing.assert_array_equal(y, _expected(x, ids, layout, everyone))
            assert all(np.all(mask) for mask in after)
        assert group.info().left_out == ()
        group._native_group.handle.skip_rank(1)
        for i in range(20):
            start = time.monotonic()
            y, *after = step(x, ids, masks)
            group.check()
            waited = time.monotonic() - start
            assert (0.9 < waited < 2.5) if i == 0 else waited < 0.5
            np.testing.assert_array_equal(
                np.asarray(y)[living], _expected(x, ids, layout, living)[living]
            )
            for mask in after:
                np.testing.assert_array_equal(
                    np.asarray(mask)[living], np.tile(living, (num_ranks - 1, 1))
                )
        assert group.info().left_out == (1,)
    with jax_ep.Group.open(mesh, "ep", name="left_out", timeout=1.0) as again:
        y, *_ = step(x, ids, masks)
        again.check()
        np.testing.assert_array_equal(y, _expected(x, ids, layout, everyone))


def test_masks_are_read_by_captured_programs(mesh):
    """A command buffer replays the calls of a scan; the mask is an operand of each of them."""
    num_ranks = mesh.size
    x, ids = _inputs(num_ranks)
    counts = sorted({num_ranks, num_ranks - 1, 1, 0}, reverse=True)
    masks = np.stack([np.arange(num_ranks) < count for count in counts])
    with jax_ep.Group.open(mesh, "ep", name="captured", timeout=20.0) as group:

        def steps(x, ids, masks):
            def step(_, mask):
                out = jax_ep.low_latency_dispatch(
                    x,
                    ids,
                    group=group,
                    num_experts=PER_RANK * num_ranks,
                    max_tokens_per_rank=TOKENS,
                    rank_mask=mask,
                )
                return None, jax_ep.low_latency_combine(out.x, out.handle)

            return jax.lax.scan(step, None, masks)[1]

        y = on_ranks(steps, mesh)(x, ids, np.tile(masks, (num_ranks, 1, 1)))
        group.check(y)
        for i, mask in enumerate(masks):
            expected = np.where(mask[:, None, None], _expected(x, ids, "expert", mask), 0)
            np.testing.assert_array_equal(np.asarray(y)[:, i], expected)


@pytest.mark.parametrize("how", ["SIGKILL", "SIGINT"])
def test_a_process_that_ends_is_left_out(how):
    """The others go on with right values, and the process's end is no failure of the group."""
    num_gpus = launch.count_gpus()
    if num_gpus < 2:
        pytest.skip("needs two GPUs")
    codes = [0] * num_gpus
    codes[1] = -getattr(signal, how)
    outputs = launch.launch(
        [path_of("goes_on_without_a_rank"), how],
        num_processes=num_gpus,
        deadline=120.0,
        environment={"XLA_FLAGS": "", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.1"},
        exit_codes=codes,
    )
    for output in outputs[:1] + outputs[2:]:
        assert "passed" in output.splitlines()
        assert 1.8 < number_behind("waited", output) < 5.0
