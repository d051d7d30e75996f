"""Transports: how rows cross between the nodes of a group, along the rails.

`transport_of` is the only place that chooses. The opening of a group has decided what carries the
rails, and why (opening/levels.py; `Group.info().transport` tells). Another way to carry them, such
as an engine that puts rows into windows of its own, is one more class here.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jax_ep._src.base.spec import CallSpec, ExchangeSpec, Route, RowIndex
from jax_ep._src.ops.combine.call import combine
from jax_ep._src.ops.common.check_mesh import check_mesh
from jax_ep._src.ops.common.collectives import gather, swap
from jax_ep._src.ops.common.tokens import from_bits, to_bits
from jax_ep._src.ops.pull_rows.call import pull_rows
from jax_ep._src.ops.two_levels.nodes import Nodes
from jax_ep._src.ops.two_levels.parts import levels_of, nodes_of, on_rail


@dataclass(frozen=True)
class Transport(ABC):
    """Crossings between the N ranks of a rail, which all make the same calls.

    Attributes:
      spec: the exchange of the whole group.
      call: the spec of moves over the rail.
    """

    spec: ExchangeSpec
    call: CallSpec

    @property
    def nodes(self) -> Nodes:
        """The nodes of the group."""
        return nodes_of(self.spec.group)

    @abstractmethod
    def cross(self, rows: jax.Array, takes: jax.Array | None = None) -> jax.Array:
        """Brings the rows that the ranks of the rail have for this one.

        Args:
          rows: [N, T, ...], the rows for each node; or [1, T, ...], the same rows for all nodes.
          takes: [N, T] bool, the rows of each node that this rank wants; None: all.

        Returns:
          [N, T, ...], by the node where the rows were. Rows that are not wanted are zeros, or the
          rows themselves if the transport does not leave them out.
        """

    def add(self, partials: jax.Array, takes: jax.Array, biases: Sequence[jax.Array]) -> jax.Array:
        """Brings the rows that all nodes have for this rank, and adds them.

        Args:
          partials: [N, T, hidden], the rows of this node for each rank of the rail; zeros where the
            node has none.
          takes: [N, T] bool, the nodes that have a row for each token of this rank.
          biases: [T, hidden] each.

        Returns:
          [T, hidden]: the f32 sum of the rows in the order of the nodes, then of the biases,
          rounded. It is a combine over the rail, in the rank layout.
        """
        num_nodes, num_tokens = partials.shape[:2]
        spec = on_rail(self.spec, num_nodes * num_tokens)
        # A forwarder has row (n, t) for token t of the rail's rank in node n.
        row = spec.group.rank() * num_tokens + jnp.arange(num_tokens, dtype=jnp.int32)
        index = RowIndex(
            send_rank=None,
            send_row=jnp.where(takes.T, row[:, None], -1),
            recv_src=jnp.arange(spec.recv_capacity, dtype=jnp.int32),
            recv_k=None,
        )
        return combine(spec, index, partials.reshape(spec.recv_capacity, -1), None, biases)


class Mapped(Transport):
    """Custom calls over the rail, whose ranks read one another's memory.

    Rows that are not wanted stay where they are.
    """

    def cross(self, rows: jax.Array, takes: jax.Array | None = None) -> jax.Array:
        """Pulls the wanted rows, if peers can read this array."""
        if not self.call.group.can_stage(rows):
            return Stock(self.spec, self.call).cross(rows, takes)
        num_parts, num_tokens, *width = rows.shape
        self.nodes.require_places(self.call.op, num_tokens)
        node = self.call.group.rank()
        index = self.nodes.on_rail(node, num_tokens, has_parts=num_parts > 1)
        if takes is not None:
            index = jnp.where(takes, index, -1)
        pulled = pull_rows(self.call, index.reshape(-1), rows.reshape(-1, *width))
        return pulled.reshape(self.nodes.num_nodes, num_tokens, *width)


class Stock(Transport):
    """JAX's collectives over the rail. All rows cross."""

    def cross(self, rows: jax.Array, takes: jax.Array | None = None) -> jax.Array:
        """Gathers or swaps all rows."""
        bits = to_bits(check_mesh(rows, self.call.group, op=self.call.op))
        exchange = gather if rows.shape[0] == 1 else swap
        return from_bits(exchange(self.call.group, bits), rows.dtype)


def transport_of(spec: ExchangeSpec, route: Route) -> Transport:
    """Returns the transport of an exchange that takes this route."""
    levels = levels_of(spec.group)
    backend = "xla" if route.backend == "xla" else levels.between
    kind = Stock if backend == "xla" else Mapped
    return kind(spec, CallSpec(levels.rail, backend, route.num_sms, spec.op))
