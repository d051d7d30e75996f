"""Routings by name, so that a failing test names the routing."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int32]


def _choose(rng: np.random.Generator, scores: npt.NDArray[np.float64], num_topk: int) -> Ids:
    """The top choices of random scores, distinct within a token."""
    noisy = scores + rng.gumbel(size=scores.shape)
    return np.argsort(-noisy, axis=-1)[..., :num_topk].astype(np.int32)


def balanced(rng: np.random.Generator, shape: tuple[int, int, int], num_experts: int) -> Ids:
    """Every expert is equally likely."""
    return _choose(rng, np.zeros((*shape[:2], num_experts)), shape[2])


def skewed(rng: np.random.Generator, shape: tuple[int, int, int], num_experts: int) -> Ids:
    """A few experts take most of the tokens."""
    popularity = -1.5 * np.log1p(np.arange(num_experts))
    return _choose(rng, np.broadcast_to(popularity, (*shape[:2], num_experts)), shape[2])


def all_to_one_rank(rng: np.random.Generator, shape: tuple[int, int, int], num_experts: int) -> Ids:
    """Every choice is an expert of the last rank; those that find no expert there are -1."""
    num_ranks, num_tokens, num_topk = shape
    num_local = num_experts // num_ranks
    ids = np.full(shape, -1, np.int32)
    here = min(num_topk, num_local)
    scores = np.zeros((num_ranks, num_tokens, num_local))
    ids[..., :here] = _choose(rng, scores, here) + (num_ranks - 1) * num_local
    return ids


def masked(rng: np.random.Generator, shape: tuple[int, int, int], num_experts: int) -> Ids:
    """Some choices and some whole tokens are -1."""
    ids = balanced(rng, shape, num_experts)
    ids[rng.random(shape) < 0.3] = -1
    ids[rng.random(shape[:2]) < 0.2] = -1
    return ids


def one_empty_rank(rng: np.random.Generator, shape: tuple[int, int, int], num_experts: int) -> Ids:
    """Rank 0 sends nothing, and, with more than one rank, receives nothing."""
    ids = balanced(rng, shape, num_experts)
    ids[0] = -1
    if shape[0] > 1:
        ids[ids < num_experts // shape[0]] = -1
    return ids


def all_empty(rng: np.random.Generator, shape: tuple[int, int, int], num_experts: int) -> Ids:
    """Nobody sends anything."""
    return np.full(shape, -1, np.int32)


def invalid_ids(rng: np.random.Generator, shape: tuple[int, int, int], num_experts: int) -> Ids:
    """Some ids name no expert."""
    ids = balanced(rng, shape, num_experts)
    ids[rng.random(shape) < 0.1] = num_experts
    ids[rng.random(shape) < 0.1] = -7
    return ids


# shape is (num_ranks, num_tokens, num_topk)
Routing = Callable[[np.random.Generator, tuple[int, int, int], int], Ids]

ALL: tuple[Routing, ...] = (
    balanced,
    skewed,
    all_to_one_rank,
    masked,
    one_empty_rank,
    all_empty,
    invalid_ids,
)
BY_NAME = {routing.__name__: routing for routing in ALL}
