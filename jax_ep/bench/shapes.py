"""Points of a benchmark: shapes by name, points, and the data of a point."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_ep
from jax_ep._src.base.config import FP8_BLOCK
from jax_ep._src.base.errors import ConfigError
from jax_ep.testing import routing
from jax_ep.testing.cases import DTYPES, Case
from jax_ep.testing.ranks import place


@dataclass(frozen=True)
class Shape:
    """Sizes of one MoE layer; tokens are those of each rank.

    `max_nodes`: group-limited routing: nodes of the group that a token may go to; None, or as many
    as there are: no limit.
    """

    tokens: int
    hidden: int
    topk: int
    experts: int
    max_nodes: int | None = None


SHAPES = {
    "tiny": Shape(tokens=64, hidden=128, topk=2, experts=16),
    "cpu-1k": Shape(tokens=1024, hidden=2048, topk=4, experts=64),
    "mixtral": Shape(tokens=4096, hidden=4096, topk=2, experts=8),
    "deepseek-v3": Shape(tokens=4096, hidden=7168, topk=8, experts=256),
    "deepseek-v3-limited": Shape(tokens=4096, hidden=7168, topk=8, experts=256, max_nodes=4),
    "decode": Shape(tokens=128, hidden=7168, topk=8, experts=256),
    "decode-22": Shape(tokens=128, hidden=2048, topk=22, experts=512),
}


FP8 = "fp8"  # e4m3 rows with an f32 scale for each block of 128; dispatched only
BENCH_DTYPES = (*DTYPES, FP8)


@dataclass(frozen=True, kw_only=True)
class Point(Case):
    """A case that is measured; dtype may be "fp8" as well.

    Attributes:
      shape: its name.
      balance: that the capacity was computed with.
      max_nodes: as in Shape.
    """

    shape: str
    balance: float | None
    max_nodes: int | None = None

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of x, scales included."""
        if self.dtype == FP8:
            return self.hidden + 4 * (self.hidden // FP8_BLOCK)
        return super().row_bytes


def make_point(
    name: str,
    shape: Shape,
    *,
    dtype: str,
    layout: str,
    num_ranks: int,
    balance: Any,
    fill: str,
    alignment: int = 1,
) -> Point:
    """A point; `balance` "auto" is 1.25 in the expert layout, the worst case in the rank layout.

    The alignment is that of the expert layout; room for its padding is part of the capacity.
    """
    expert_alignment = alignment if layout == "expert" else 1
    if balance == "auto":
        balance = 1.25 if layout == "expert" else None
    capacity = jax_ep.recv_capacity(
        num_tokens=shape.tokens,
        num_topk=shape.topk,
        num_experts=shape.experts,
        num_ranks=num_ranks,
        layout=layout,
        expert_alignment=expert_alignment,
        balance=balance,
    )
    return Point(
        shape=name,
        num_ranks=num_ranks,
        layout=layout,
        num_tokens=shape.tokens,
        num_topk=shape.topk,
        experts_per_rank=shape.experts // num_ranks,
        hidden=shape.hidden,
        dtype=dtype,
        balance=balance,
        max_nodes=shape.max_nodes,
        recv_capacity=capacity,
        expert_alignment=expert_alignment,
        fill=fill,
    )


@dataclass(frozen=True)
class ReducePoint:
    """A size at which an operation of the all_reduce family is measured.

    Attributes:
      op: which of them.
      tokens: rows of a rank's x; of reduce_scatter, of each of the parts of x.
      hidden: elements of a row.
      dtype: a key of DTYPES.
    """

    op: str
    tokens: int
    hidden: int
    dtype: str

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.hidden * jnp.dtype(DTYPES[self.dtype]).itemsize

    @property
    def num_bytes(self) -> int:
        """Bytes that the algorithm is chosen by."""
        return self.tokens * self.row_bytes

    @property
    def shape(self) -> str:
        """The size by name."""
        return f"{self.num_bytes / 1024:g} KiB"


def make_reduce_point(op: str, num_bytes: int, *, dtype: str, hidden: int) -> ReducePoint | None:
    """As many whole rows as `num_bytes` holds, if any; where no norm is taken, one row of all."""
    elements = num_bytes // jnp.dtype(DTYPES[dtype]).itemsize
    if op == "all_reduce_residual_rmsnorm":
        tokens = elements // hidden
    else:
        tokens, hidden = min(elements, 1), elements
    return ReducePoint(op, tokens, hidden, dtype) if tokens else None


def make_inputs(
    point: Point, mesh: jax.sharding.Mesh, seed: int = 0, *, ranks_per_node: int | None = None
) -> tuple[Any, ...]:
    """(x, topk_idx, topk_weights) [R, ...] on the mesh: balanced routing, weights that add to 1.

    With fp8, x is a pair of rows and scales. `ranks_per_node`: that of the group, for points with
    `max_nodes`; None: all.
    """
    rng = np.random.default_rng(seed)
    tokens = (point.num_ranks, point.num_tokens)
    x: Any = rng.standard_normal((*tokens, point.hidden), np.float32)
    if point.dtype == FP8:
        pair = jax_ep.quantize_fp8(x.reshape(-1, point.hidden))
        x = tuple(np.asarray(a).reshape(*tokens, -1) for a in pair)
    else:
        x = x.astype(DTYPES[point.dtype])
    ids = _route(point, rng, point.num_ranks // (ranks_per_node or point.num_ranks))
    weights = rng.random(ids.shape, np.float32) + 0.1
    weights /= weights.sum(axis=-1, keepdims=True)
    arrays: tuple[Any, ...] = place((x, ids, weights), mesh)
    return arrays


def _route(point: Point, rng: np.random.Generator, num_nodes: int) -> routing.Ids:
    shape = point.num_ranks, point.num_tokens, point.num_topk
    limit = point.max_nodes
    if limit is None or limit >= num_nodes:
        return routing.balanced(rng, shape, point.num_experts)
    pool = limit * (point.num_experts // num_nodes)
    if limit < 1 or point.num_topk > pool:
        raise ConfigError(
            f"bench: {point.num_topk} experts of a token cannot be on at most {limit} of "
            f"{num_nodes} nodes, which have {pool}"
        )
    return routing.group_limited(
        rng, shape, point.num_experts, num_groups=num_nodes, max_groups=limit
    )
