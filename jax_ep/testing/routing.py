"""Routings with names, so that a failing test says which routing broke."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int32]


def _choose(rng: np.random.Generator, scores: npt.NDArray[np.float64], num_topk: int) -> Ids:
    """Returns the top choices of noisy scores, distinct within a token."""
    noisy = scores + rng.gumbel(size=scores.shape)
    return np.argsort(-noisy, axis=-1)[..., :num_topk].astype(np.int32)


def balanced(rng: np.random.Generator, shape: tuple[int, int, int], num_experts: int) -> Ids:
    """Makes every expert equally likely."""
    return _choose(rng, np.zeros((*shape[:2], num_experts)), shape[2])


def skewed(rng: np.random.Generator, shape: tuple[int, int, int], num_experts: int) -> Ids:
    """Sends most tokens to a few experts."""
    popularity = -1.5 * np.log1p(np.arange(num_experts))
    return _choose(rng, np.broadcast_to(popularity, (*shape[:2], num_experts)), shape[2])


def all_to_one_rank(rng: np.random.Generator, shape: tuple[int, int, int], num_experts: int) -> Ids:
    """Sends every choice to the last rank; choices beyond the number of its experts are -1."""
    num_ranks, num_tokens, num_topk = shape
    num_local = num_experts // num_ranks
    ids = np.full(shape, -1, np.int32)
    here = min(num_topk, num_local)
    scores = np.zeros((num_ranks, num_tokens, num_local))
    ids[..., :here] = _choose(rng, scores, here) + (num_ranks - 1) * num_local
    return ids


def masked(rng: np.random.Generator, shape: tuple[int, int, int], num_experts: int) -> Ids:
    """Masks some choices and some whole tokens with -1."""
    ids = balanced(rng, shape, num_experts)
    ids[rng.random(shape) < 0.3] = -1
    ids[rng.random(shape[:2]) < 0.2] = -1
    return ids


def one_empty_rank(rng: np.random.Generator, shape: tuple[int, int, int], num_experts: int) -> Ids:
    """Lets rank 0 send nothing, and receive nothing if there are other ranks."""
    ids = balanced(rng, shape, num_experts)
    ids[0] = -1
    if shape[0] > 1:
        ids[ids < num_experts // shape[0]] = -1
    return ids


def all_empty(rng: np.random.Generator, shape: tuple[int, int, int], num_experts: int) -> Ids:
    """Lets no rank send anything."""
    return np.full(shape, -1, np.int32)


def invalid_ids(rng: np.random.Generator, shape: tuple[int, int, int], num_experts: int) -> Ids:
    """Makes some ids invalid."""
    ids = balanced(rng, shape, num_experts)
    ids[rng.random(shape) < 0.1] = num_experts
    ids[rng.random(shape) < 0.1] = -7
    return ids


def group_limited(
    rng: np.random.Generator,
    shape: tuple[int, int, int],
    num_experts: int,
    *,
    num_groups: int,
    max_groups: int,
) -> Ids:
    """Chooses experts out of `max_groups` of `num_groups` equal groups, as DeepSeek-V3 does.

    A token takes the groups whose two best experts have the highest scores together, and its
    experts from these groups only. All experts are equally likely.
    """
    scores = rng.random((*shape[:2], num_groups, num_experts // num_groups))
    best = np.sort(scores, axis=-1)[..., -2:].sum(axis=-1)
    is_open = np.argsort(np.argsort(-best, axis=-1), axis=-1) < max_groups
    choices = np.where(is_open[..., None], scores, -1.0).reshape(*shape[:2], num_experts)
    return np.argsort(-choices, axis=-1)[..., : shape[2]].astype(np.int32)


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
