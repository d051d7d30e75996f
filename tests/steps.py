"""Steps that several test files and programs run."""

import jax
import jax.numpy as jnp

import jax_ep


def make_echo(group, backend=None):
    """Makes a step that sends rows to the ranks of their ids, and adds up what comes back."""

    def echo(x, ids):
        out = jax_ep.dispatch(x, ids, group=group, num_experts=group.num_ranks, backend=backend)
        return jax_ep.combine(out.x, out.handle, backend=backend)

    return echo


def make_expert_layer(num_ranks, num_experts, num_topk, axis):
    """Makes a layer of experts as models write it on jax.lax.ragged_all_to_all: one rank's part.

    Rows are sorted by expert, sent to the experts' ranks, sorted by local expert, multiplied, and
    taken all the way back.
    """
    num_local = num_experts // num_ranks

    def before(a, axis):
        return jnp.cumsum(a, axis=axis, dtype=jnp.int32) - a

    def layer(x, topk_idx, topk_weights, kernels):
        num_tokens, hidden = x.shape
        rank = jax.lax.axis_index(axis)
        capacity = num_ranks * num_tokens * min(num_topk, num_local)
        # Permute.
        experts = topk_idx.reshape(-1)
        order = jnp.argsort(experts, stable=True)
        rows = x[order // num_topk]
        counts = jnp.bincount(experts, length=num_experts).astype(jnp.int32)
        all_counts = jax.lax.all_gather(counts, axis).reshape(num_ranks, num_ranks, num_local)
        sizes = jnp.sum(all_counts, axis=2, dtype=jnp.int32)  # [source, destination]
        # Exchange.
        there = before(sizes, 1)[rank], sizes[rank], before(sizes, 0)[rank], sizes[:, rank]
        received = jax.lax.ragged_all_to_all(
            rows, jnp.zeros((capacity, hidden), x.dtype), *there, axis_name=axis
        )
        # Sort by local expert; rows behind the received ones come last.
        here = all_counts[:, rank]
        experts_here = jnp.repeat(
            jnp.append(jnp.tile(jnp.arange(num_local), num_ranks), num_local),
            jnp.append(here.reshape(-1), capacity - jnp.sum(here, dtype=jnp.int32)),
            total_repeat_length=capacity,
        )
        local_order = jnp.argsort(experts_here, stable=True)
        group_sizes = jnp.sum(here, axis=0, dtype=jnp.int32)
        y = jax.lax.ragged_dot(received[local_order], kernels, group_sizes)
        y = y[jnp.argsort(local_order)]
        # The way back.
        first, places = before(sizes, 0)[:, rank], before(sizes, 1)[:, rank]
        back = first, sizes[:, rank], places, sizes[rank]
        returned = jax.lax.ragged_all_to_all(
            y, jnp.zeros((num_tokens * num_topk, hidden), x.dtype), *back, axis_name=axis
        )
        # Unpermute.
        by_choice = returned[jnp.argsort(order)].reshape(num_tokens, num_topk, hidden)
        return jnp.einsum("tkh,tk->th", by_choice, topk_weights)

    return layer


def dense_expert_layer(x, topk_idx, topk_weights, kernels):
    """The layer for the tokens of all ranks, with every expert in one place."""
    by_choice = jnp.einsum("...th,...tkhg->...tkg", x, kernels[topk_idx])
    return jnp.einsum("...tkg,...tk->...tg", by_choice, topk_weights)
