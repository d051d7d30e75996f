"""Checks of get_dispatch_layout against the reference."""

from dataclasses import fields
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_ep
from jax_ep import reference
from jax_ep.testing import routing as routings
from jax_ep.testing.compare import assert_same_bits
from jax_ep.testing.conformance.check import Check, noted
from jax_ep.testing.ranks import on_group

_NUM_STEPS = 3


def get_dispatch_layout(
    group: jax_ep.Group, backend: str, *, num_tokens: int, num_topk: int, experts_per_rank: int
) -> None:
    """Compares every count and the mask for every named routing, in three calls of one scan."""
    num_experts = experts_per_rank * group.num_ranks

    def shift(ids: Any, step: Any, xp: Any) -> Any:
        is_expert = (ids >= 0) & (ids < num_experts)
        return xp.where(is_expert, (ids + step) % num_experts, ids)

    def fn(ids: Any) -> Any:
        def step(number: Any, _: None) -> Any:
            out = jax_ep.get_dispatch_layout(
                shift(ids, number, jnp), num_experts=num_experts, group=group, backend=backend
            )
            return number + 1, out

        return jax.lax.scan(step, 0, length=_NUM_STEPS)[1]

    compiled = on_group(fn, group)
    names = [field.name for field in fields(jax_ep.DispatchLayout)]
    for name, routing in routings.BY_NAME.items():
        with noted(f"routing {name}"):
            shape = (group.num_ranks, num_tokens, num_topk)
            ids = routing(np.random.default_rng(0), shape, num_experts)
            out = compiled(ids)
            steps = [
                reference.get_dispatch_layout(
                    shift(ids, step, np),
                    num_experts=num_experts,
                    ranks_per_node=group.ranks_per_node,
                )
                for step in range(_NUM_STEPS)
            ]
            for what, values in zip(names, zip(*steps, strict=True), strict=True):
                assert_same_bits(getattr(out, what), np.stack(values, axis=1), what=what)


CHECKS = tuple(
    Check(
        get_dispatch_layout,
        frozenset({"get_dispatch_layout"}),
        {"num_tokens": num_tokens, "num_topk": num_topk, "experts_per_rank": experts_per_rank},
    )
    for num_tokens, num_topk, experts_per_rank in ((13, 3, 4), (1, 1, 1), (257, 8, 32))
)
FULL = CHECKS
