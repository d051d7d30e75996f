"""The custom call of get_dispatch_layout; the _ffi.h of the same stem declares its handler."""

from typing import Any

import jax
import jax.numpy as jnp

from jax_ep._src.ops.common.primitive import Result, make_primitive
from jax_ep._src.ops.get_dispatch_layout import stock


def _results(
    topk_idx: Any, *, num_ranks: int, num_nodes: int, num_experts: int
) -> tuple[Result, ...]:
    return (
        Result((num_ranks,), jnp.int32),
        Result((num_nodes,), jnp.int32),
        Result((num_experts,), jnp.int32),
        Result((topk_idx.shape[0], num_ranks), jnp.bool_),
    )


_bind = make_primitive(
    "get_dispatch_layout", _results, platforms=("cpu", "cuda"), has_position=False
)


def get_dispatch_layout(
    topk_idx: jax.Array, *, num_ranks: int, num_nodes: int, num_experts: int, backend: str
) -> tuple[jax.Array, ...]:
    """Counts tokens per rank, node and expert, and marks them in [num_tokens, num_ranks]."""
    count = stock.get_dispatch_layout if backend == "xla" else _bind
    results: tuple[jax.Array, ...] = count(
        topk_idx, num_ranks=num_ranks, num_nodes=num_nodes, num_experts=num_experts
    )
    return results
