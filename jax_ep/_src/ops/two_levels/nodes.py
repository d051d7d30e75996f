"""Numbers of ranks, tokens and rows: as the whole group counts them, and as a node counts them.

A group of R ranks has N nodes of P consecutive ranks. The node of a rank is rank // P, and its
index there is rank % P. A forwarder has the tokens of its rail in N parts, one for each node. So
the ranks of a node together have P * N parts: that of source rank s is part s // P of rank s % P.
-1 means none everywhere.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jax_ep._src.base import config
from jax_ep._src.base.errors import ConfigError
from jax_ep._src.ops.common.tokens import places_of_parts


class Nodes(NamedTuple):
    """The nodes of a group."""

    num_nodes: int
    ranks_per_node: int

    # --- experts

    def experts_in_node(self, topk_idx: jax.Array, node: jax.Array, num_experts: int) -> jax.Array:
        """Returns ids as a node numbers its experts; -1 for other ids, valid or not."""
        per_node = num_experts // self.num_nodes
        is_expert = (topk_idx >= 0) & (topk_idx < num_experts)
        is_here = is_expert & (topk_idx // per_node == node)
        return jnp.where(is_here, topk_idx % per_node, -1)

    # --- rows of the tokens of one rank

    def columns_by_node(self, send_row: jax.Array) -> jax.Array:
        """Returns [N, T, P] from the send_row [T, R] of the rank layout."""
        by_node = send_row.reshape(-1, self.num_nodes, self.ranks_per_node)
        return jnp.swapaxes(by_node, 0, 1)

    def columns_of_ranks(self, by_node: jax.Array) -> jax.Array:
        """Returns the send_row [T, R] of the rank layout from [N, T, P]."""
        num_ranks = self.num_nodes * self.ranks_per_node
        return jnp.swapaxes(by_node, 0, 1).reshape(-1, num_ranks)

    def choices_in_node(
        self, send_rank: jax.Array, send_row: jax.Array, node: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Returns send_rank and send_row of the expert layout as a node counts them."""
        is_here = (send_rank >= 0) & (send_rank // self.ranks_per_node == node)
        rank = jnp.where(is_here, send_rank % self.ranks_per_node, -1)
        return rank, jnp.where(is_here, send_row, -1)

    def has_rows(self, send_rank: jax.Array | None, send_row: jax.Array) -> jax.Array:
        """Returns [N, T] bool: whether each token has a row in each node."""
        if send_rank is None:
            return jnp.any(self.columns_by_node(send_row) >= 0, axis=2)
        node = jnp.where(send_row >= 0, send_rank // self.ranks_per_node, -1)
        nodes = jnp.arange(self.num_nodes, dtype=jnp.int32)
        return jnp.any(node[None] == nodes[:, None, None], axis=2)

    # --- places in the arrays of all ranks: rank * size + place

    def at_forwarders(self, index: jax.Array, size: int) -> jax.Array:
        """Returns the places, in the node, of the elements of all sources that `index` names.

        Each of P ranks has N parts of `size` elements there.
        """
        return places_of_parts(index, size, num_ranks=self.ranks_per_node, num_parts=self.num_nodes)

    def in_node(self, index: jax.Array, size: int, node: jax.Array) -> jax.Array:
        """Returns the places of elements of this node's ranks; -1 for those of other nodes."""
        rank, place = index // size, index % size
        is_here = (index >= 0) & (rank // self.ranks_per_node == node)
        return jnp.where(is_here, rank % self.ranks_per_node * size + place, -1)

    def node_of(self, index: jax.Array, size: int) -> jax.Array:
        """Returns the node of each place, -1 = none."""
        return jnp.where(index >= 0, index // (size * self.ranks_per_node), -1)

    def on_rail(self, node: jax.Array, size: int, *, has_parts: bool) -> jax.Array:
        """Returns [N, size], the places in the arrays of a rail that are meant for this node.

        `has_parts`: each rank of the rail has N parts of `size` elements, one for each node. Else
        all nodes are meant by the same `size` elements.
        """
        ranks = jnp.arange(self.num_nodes, dtype=jnp.int32)[:, None]
        if has_parts:
            ranks = ranks * self.num_nodes + node
        return ranks * size + jnp.arange(size, dtype=jnp.int32)[None]

    def require_places(self, op: str, size: int) -> None:
        """Raises ConfigError unless int32 can count what a rail's ranks have for one another."""
        largest = self.num_nodes * self.num_nodes * size
        if largest > config.MAX_INDEX:
            raise ConfigError(
                f"{op}: with {self.num_nodes} nodes num_nodes * num_nodes * num_tokens must be at "
                f"most {config.MAX_INDEX}, got {largest}"
            )
