"""Operands and a group for tests of few tokens."""

import numpy as np

import jax_ep

NUM_RANKS, NUM_EXPERTS, TOKENS, TOPK, HIDDEN = 2, 4, 5, 2, 128


def inputs(seed=0, tokens=TOKENS):
    """Makes rows, choices and weights [R, T, ...] of all ranks."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((NUM_RANKS, tokens, HIDDEN)).astype(np.float32)
    ids = rng.permuted(
        np.broadcast_to(np.arange(NUM_EXPERTS), (NUM_RANKS, tokens, NUM_EXPERTS)), axis=-1
    )[..., :TOPK]
    return x, ids.astype(np.int32), rng.random(ids.shape, np.float32)


def send(group, x, ids, weights=None, **options):
    """Sends tokens by low_latency_dispatch, with default sizes."""
    options = {"num_experts": NUM_EXPERTS, "max_tokens_per_rank": TOKENS, **options}
    return jax_ep.low_latency_dispatch(x, ids, weights, group=group, **options)
