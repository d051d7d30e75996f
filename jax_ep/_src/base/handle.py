"""Results of dispatch: the received rows, and the handle that leads back."""

from dataclasses import dataclass, field
from typing import Any

import jax

from jax_ep._src.base.spec import DispatchSpec, RouteSpec, RowIndex


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DispatchHandle:
    """The routing of one dispatch on one rank, as arrays. A pytree: save it, rematerialise it.

    Do not edit the arrays. If two rows claim to be the same choice of a token, a dispatch along
    the handle on the `cuda` back end may leave anything in one of them. If recv_src and send_row do
    not fit, a low_latency_combine waits until the timeout, and ends the group.

    `T` = tokens of each rank, `C` = recv_capacity, `K` = num_topk, `R` = num_ranks, -1 = none.

    Attributes:
      recv_src: [C] int32, source rank * T + token of each received row.
      recv_k: expert layout: [C] int32, which of the token's K choices the row is; else None.
      send_row: [T, R] (rank layout) or [T, K] (expert layout) int32, the row that a token became
        at the destination; -1 if nothing was sent, or if the row was dropped.
      send_rank: expert layout: [T, K] int32, the destination of each choice; else None (it is the
        column of send_row).
      group_sizes: [num_local_experts] int32, as in Dispatched.
      num_recv, num_dropped, num_invalid: [1] int32, as in Dispatched.
      layout: "rank" or "expert".
      num_experts: experts of the whole group.
      recv_capacity: C.
      group: identity of the group.
      rank_mask: [R] bool, as in Dispatched; None without a mask.
    """

    recv_src: jax.Array
    recv_k: jax.Array | None
    send_row: jax.Array
    send_rank: jax.Array | None
    group_sizes: jax.Array
    num_recv: jax.Array
    num_dropped: jax.Array
    num_invalid: jax.Array
    layout: str = field(metadata={"static": True})
    num_experts: int = field(metadata={"static": True})
    recv_capacity: int = field(metadata={"static": True})
    group: str = field(metadata={"static": True})
    rank_mask: jax.Array | None = None

    def index(self) -> RowIndex:
        """Returns the arrays that combine needs."""
        return RowIndex(self.send_rank, self.send_row, self.recv_src, self.recv_k, self.rank_mask)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Dispatched:
    """The rows that one rank received, and their routing. A pytree; absent fields are None.

    `C` = recv_capacity, `L` = num_local_experts, `K` = num_topk.

    Attributes:
      x: [C, hidden], the rows. The `fill` of dispatch says which unused rows are zero.
      scales: [C, S], the scales of fp8 rows, filled like x.
      payload: [C, P], the payload that travelled with the rows, filled like x.
      topk_idx: rank layout: [C, K] int32, local expert ids, -1 = an expert of another rank. None
        in the expert layout, and after a dispatch along a handle.
      weights: rank layout: [C, K], expert layout: [C]; f32, 0 where there is no choice.
      group_sizes: [L] int32, rows per local expert; expert layout: rounded up to the alignment.
      num_recv: [1] int32, rows in use, alignment padding included.
      num_dropped: [1] int32, rows that did not fit into recv_capacity on this rank.
      num_invalid: [1] int32, ids of this rank's topk_idx outside [-1, num_experts).
      handle: the way back.
      rank_mask: [num_ranks] bool after a low-latency dispatch with rank_mask: the ranks that took
        part. False for those that the mask left out, and on the `cuda` back end also for those that
        did not answer. None without a mask.
    """

    x: jax.Array
    scales: jax.Array | None
    payload: jax.Array | None
    topk_idx: jax.Array | None
    weights: jax.Array | None
    group_sizes: jax.Array
    num_recv: jax.Array
    num_dropped: jax.Array
    num_invalid: jax.Array
    handle: DispatchHandle
    rank_mask: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class InFlight:
    """An exchange that one rank has sent and not yet received. A pytree.

    It may cross jit, scan and cond, and another program may receive it.

    Attributes:
      number: [2] int32, the number of the exchange and its tag; zeros if the send failed, and where
        a receive makes the whole exchange.
      through: the arrays that the send has passed through, in the caller's pytree.
      operands: what the receive reads besides.
      spec: the static facts of the exchange.
      has_scales: whether a dispatch has scales.
    """

    number: jax.Array
    through: Any
    operands: Any
    spec: DispatchSpec | RouteSpec = field(metadata={"static": True})
    has_scales: bool = field(metadata={"static": True}, default=False)
