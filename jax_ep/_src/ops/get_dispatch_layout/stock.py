"""get_dispatch_layout in plain JAX."""

import jax
import jax.numpy as jnp


def get_dispatch_layout(
    topk_idx: jax.Array, *, num_ranks: int, num_nodes: int, num_experts: int
) -> tuple[jax.Array, ...]:
    """Computes the results of the custom call."""
    is_expert = (topk_idx >= 0) & (topk_idx < num_experts)
    ids = jnp.where(is_expert, topk_idx, num_experts)
    experts = jnp.arange(num_experts, dtype=jnp.int32)[None, None, :]
    per_expert = jnp.sum(ids[:, :, None] == experts, axis=(0, 1), dtype=jnp.int32)
    rank = ids // (num_experts // num_ranks)
    ranks = jnp.arange(num_ranks, dtype=jnp.int32)[None, None, :]
    in_rank = jnp.any(rank[:, :, None] == ranks, axis=1)
    in_node = jnp.any(in_rank.reshape(-1, num_nodes, num_ranks // num_nodes), axis=-1)
    return (
        jnp.sum(in_rank, axis=0, dtype=jnp.int32),
        jnp.sum(in_node, axis=0, dtype=jnp.int32),
        per_expert,
        in_rank,
    )
