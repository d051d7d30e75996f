"""The primitive of get_dispatch_layout; its other side is the _ffi.h of the same stem."""

from typing import Any

import jax
import jax.numpy as jnp

from jax_ep._primitives._base import make_primitive


def _results(
    topk_idx: Any, *, num_ranks: int, num_nodes: int, num_experts: int
) -> list[tuple[tuple[int, ...], Any]]:
    return [
        ((num_ranks,), jnp.int32),
        ((num_nodes,), jnp.int32),
        ((num_experts,), jnp.int32),
        ((topk_idx.shape[0], num_ranks), jnp.bool_),
    ]


_bind = make_primitive(
    "get_dispatch_layout", _results, platforms=("cpu", "cuda"), has_position=False
)


def get_dispatch_layout(
    topk_idx: jax.Array, *, num_ranks: int, num_nodes: int, num_experts: int
) -> tuple[jax.Array, ...]:
    """The custom call: counts per rank, node and expert, and the mask [num_tokens, num_ranks]."""
    return tuple(_bind(topk_idx, num_ranks=num_ranks, num_nodes=num_nodes, num_experts=num_experts))
