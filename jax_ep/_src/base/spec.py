"""Static facts of an operation, and the arrays that back ends hand to one another.

Every object here is hashable or a tuple of arrays. None refers to an open group.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple, Self

import jax

from jax_ep._src.base import limits
from jax_ep._src.base.group_spec import GroupSpec
from jax_ep._src.base.options import Algorithm, ExchangeMode, Fill, Layout, Movement, Quantize

_GRADIENT = " (gradient)"


class Usability(NamedTuple):
    """The public operations that a back end can carry for a group, and the reason in words."""

    ops: frozenset[str]
    reason: str


@dataclass(frozen=True)
class CallSpec:
    """The static facts of one pull_rows; equal on all ranks. `op`: as in ExchangeSpec."""

    group: GroupSpec
    backend: str
    num_sms: int
    op: str


def gradient_of(op: str) -> str:
    """Returns the name of the backward pass of a public operation in errors."""
    return f"{op.removesuffix(_GRADIENT)}{_GRADIENT}"


class Route(NamedTuple):
    """The back end that carries an exchange, and the SMs that it uses if it is `cuda`."""

    backend: str
    num_sms: int


class Routes(NamedTuple):
    """The routes of all exchanges in one layout; pull_rows takes the route of a cached dispatch."""

    dispatch: Route
    cached_dispatch: Route
    combine: Route


@dataclass(frozen=True)
class ExchangeSpec:
    """The static facts that a dispatch and a combine share.

    Their gradients run other exchanges of `routes`. `op` is the name of the public operation in
    errors; another exchange may carry it. `mode`: the kernels that carry it on GPUs; those for
    few tokens only if they can; None: those for few tokens where they are faster. `few_sms`: the
    SMs that these use; None: all, or with `mode` None so many that others find room beside them.
    """

    group: GroupSpec
    routes: Routes
    layout: Layout
    recv_capacity: int
    op: str
    mode: ExchangeMode | None
    few_sms: int | None

    @property
    def is_split(self) -> bool:
        """Whether the exchange runs in two levels: inside the nodes, and between them."""
        return self.group.num_nodes > 1 and self.mode is not ExchangeMode.LOW_LATENCY

    def of_gradient(self) -> Self:
        """Returns this spec for the backward pass."""
        return replace(self, op=gradient_of(self.op))

    def to_route(self) -> "RouteSpec":
        """Returns the spec of the combine along the same routing."""
        return RouteSpec(
            self.group,
            self.routes,
            self.layout,
            self.recv_capacity,
            self.op,
            self.mode,
            self.few_sms,
        )

    def to_pull(self) -> CallSpec:
        """Returns the spec of the pull_rows along the same routing."""
        return CallSpec(self.group, *self.routes.cached_dispatch, self.op)


@dataclass(frozen=True)
class DispatchSpec(ExchangeSpec):
    """The static facts of one dispatch; equal on all ranks."""

    num_experts: int
    expert_alignment: int
    fill: Fill
    expert_stride: int = 0  # rows from the first of one expert to the first of the next; 0: packed
    quantize: Quantize = Quantize.NONE  # format of the first array of rows, beside its scales

    @property
    def backend(self) -> str:
        """The back end that carries the dispatch."""
        return self.routes.dispatch.backend

    @property
    def num_sms(self) -> int:
        """The number of SMs that the dispatch uses."""
        return self.routes.dispatch.num_sms

    @property
    def num_local_experts(self) -> int:
        """Number of experts on one rank."""
        return self.num_experts // self.group.num_ranks

    def worst_capacity(self, num_tokens: int, num_topk: int) -> int:
        """Returns the rows that a rank may receive if no token names an expert twice."""
        num_all = num_tokens * self.group.num_ranks
        if self.layout is Layout.RANK:
            return num_all
        if self.expert_stride:
            return self.num_local_experts * num_all
        padding = self.num_local_experts * (self.expert_alignment - 1)
        return num_all * min(num_topk, self.num_local_experts) + padding


@dataclass(frozen=True)
class RouteSpec(ExchangeSpec):
    """The static facts of one combine, or dispatch along a handle; equal on all ranks."""

    wire: Quantize = Quantize.NONE  # format of the sums that cross between ranks

    @property
    def backend(self) -> str:
        """The back end that carries the combine."""
        return self.routes.combine.backend

    @property
    def num_sms(self) -> int:
        """The number of SMs that the combine uses."""
        return self.routes.combine.num_sms


@dataclass(frozen=True)
class ReduceSpec:
    """The static facts of one all_reduce, reduce_scatter or all_gather; equal on all ranks.

    `op`: as in ExchangeSpec. `is_typed`: whether check_vma is on.
    """

    group: GroupSpec
    backend: str
    algorithm: Algorithm
    op: str
    movement: Movement = Movement.ALL_REDUCE
    is_typed: bool = False

    def is_carried(self, x: jax.Array) -> bool:
        """Returns whether the custom calls can carry an operand by this algorithm."""
        if self.backend != "cuda" or self.group.staging_bytes is None:
            return True
        num_bytes = x.size * x.dtype.itemsize
        if self.movement is Movement.REDUCE_SCATTER:
            num_bytes //= self.group.num_ranks
        num_ranks = self.group.num_ranks
        is_pushed = num_bytes <= limits.push_payload(num_ranks)
        return {
            Algorithm.LOW_LATENCY: True,
            Algorithm.ONE_SHOT: is_pushed or self.group.can_stage(x),
            Algorithm.TWO_SHOT: num_bytes <= limits.two_shot_payload(num_ranks),
        }.get(self.algorithm, False)


class DispatchResults(NamedTuple):
    """Results of a back end's dispatch on one rank. `C` = recv_capacity, `L` = local experts."""

    group_sizes: jax.Array  # [L]
    num_recv: jax.Array  # [1]
    num_dropped: jax.Array  # [1]
    num_invalid: jax.Array  # [1]
    recv_src: jax.Array  # [C] source rank * num_tokens + token, -1 = none
    recv_k: jax.Array | None  # expert layout: [C]
    send_row: jax.Array  # [num_tokens, num_ranks or num_topk] row at the destination, -1 = none
    recv_topk_idx: jax.Array | None  # rank layout: [C, num_topk]
    recv_weights: jax.Array | None  # rank layout: [C, num_topk], expert layout: [C]
    rows: tuple[jax.Array, ...]  # [C, ...]
    rank_mask: jax.Array | None = None  # [num_ranks] bool, after the call; None: without a mask


class RowIndex(NamedTuple):
    """Places of the rows of a dispatch, as sender and receiver know them."""

    send_rank: jax.Array | None  # expert layout: [num_tokens, num_topk] destination, -1 = none
    send_row: jax.Array
    recv_src: jax.Array
    recv_k: jax.Array | None  # expert layout: [C] index of each row among its token's choices
    rank_mask: jax.Array | None = None  # [num_ranks] bool, False = left out; None: all take part
