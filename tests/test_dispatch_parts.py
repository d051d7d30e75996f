"""dispatch of ranks that each hold the tokens of several sources, part behind part."""

from types import SimpleNamespace

import jax
import numpy as np
import parts
import pytest
from parts import Case

from jax_ep._src.base.options import ExchangeMode
from jax_ep._src.ops.dispatch import call

NUM_RANKS = 4
PLAIN = Case("rank", 2, 5, 2 * 4 * 5)
CASES = {
    "rank": PLAIN,
    "expert": Case("expert", 2, 5, 2 * 4 * 5 * 4, 8),
}
DROPS = {
    "rank": Case("rank", 3, 6, 40),
    "rank_but_one_part": Case("rank", 3, 7, 17),
    "expert": Case("expert", 3, 6, 50, 4),
    "expert_but_one_part": Case("expert", 3, 7, 20),
    "expert_stride": Case("expert", 2, 6, parts.NUM_LOCAL * 13, 1, 13, "padding"),
    "one_part": Case("expert", 1, 6, 12),
}


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_rows_are_in_the_order_of_the_sources(groups, case):
    assert parts.assert_in_order_of_sources(case, groups(NUM_RANKS), "cpu") == 0


CHOSEN = [("cpu", sizes) for sizes in DROPS] + [("xla", "rank"), ("xla", "expert")]


@pytest.mark.parametrize(("backend", "sizes"), CHOSEN)
def test_tokens_of_the_last_sources_are_dropped(groups, backend, sizes):
    assert parts.assert_in_order_of_sources(DROPS[sizes], groups(NUM_RANKS), backend) > 0


def _dispatch(group, *, num_tokens):
    """Dispatches so many tokens of each rank, in two parts."""
    tokens = (NUM_RANKS, num_tokens)
    ids = np.zeros((*tokens, parts.NUM_TOPK), np.int32)
    weights, x = np.zeros(ids.shape, np.float32), np.zeros((*tokens, 8), np.float32)
    return jax.block_until_ready(parts.dispatch(PLAIN, group, "cpu", ids, weights, x))


def test_parts_of_different_sizes_are_refused(groups):
    with pytest.raises(Exception, match="7 tokens of a rank must be a multiple of num_parts=2"):
        _dispatch(groups(NUM_RANKS), num_tokens=7)


def test_kernels_for_few_tokens_refuse_parts(groups, monkeypatch):
    # The kernels for few tokens are never chosen for parts.
    few = SimpleNamespace(THROUGHPUT=ExchangeMode.LOW_LATENCY, LOW_LATENCY=None)
    monkeypatch.setattr(call, "ExchangeMode", few)
    with pytest.raises(Exception, match="low_latency takes tokens of one source a rank"):
        _dispatch(groups(NUM_RANKS), num_tokens=10)
