"""Problems that are computed in two ways: by the operations on a group, and by the reference."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

import jax_ep
from jax_ep import reference
from jax_ep.testing import routing as routings
from jax_ep.testing.compare import assert_same_bits
from jax_ep.testing.ranks import on_group

DTYPES = {"bf16": jnp.bfloat16, "f16": jnp.float16, "f32": jnp.float32}


@dataclass(frozen=True)
class Case:
    """The static facts of a dispatch and its combine.

    Attributes:
      num_ranks: ranks of the group.
      layout: "rank" or "expert".
      num_tokens: tokens of each rank.
      num_topk: choices of each token.
      experts_per_rank: num_experts / num_ranks.
      hidden: elements of a row.
      dtype: dtype of the rows, a key of DTYPES.
      recv_capacity: rows that a rank can receive; None: the worst case, so no row is dropped.
      expert_alignment: as in dispatch.
      fill: as in dispatch.
      num_biases: number of biases of combine.
      weights_at: place of the weights of combine: None, "rows" or "tokens".
      ranks_per_node: ranks of a node, which says in which order combine adds; None: all ranks are
        one node, or the operations are low-latency ones.
    """

    num_ranks: int
    layout: str
    num_tokens: int = 12
    num_topk: int = 3
    experts_per_rank: int = 4
    hidden: int = 24
    dtype: str = "bf16"
    recv_capacity: int | None = None
    expert_alignment: int = 1
    fill: str = "zeros"
    num_biases: int = 0
    weights_at: str | None = None
    ranks_per_node: int | None = None

    @property
    def num_experts(self) -> int:
        """Experts of the whole group."""
        return self.num_ranks * self.experts_per_rank

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of x."""
        return self.hidden * jnp.dtype(DTYPES[self.dtype]).itemsize

    @property
    def capacity(self) -> int:
        """Rows that a rank can receive."""
        if self.recv_capacity is not None:
            return self.recv_capacity
        return jax_ep.recv_capacity(
            num_tokens=self.num_tokens,
            num_topk=self.num_topk,
            num_experts=self.num_experts,
            num_ranks=self.num_ranks,
            layout=self.layout,
            expert_alignment=self.expert_alignment,
            balance=None,
        )


@dataclass(frozen=True)
class Data:
    """Arrays [R, ...] of a case for all ranks, on the host."""

    topk_idx: Any
    topk_weights: Any
    x: Any
    rows: Any  # results of the experts
    biases: tuple[Any, ...]

    def operands(self) -> tuple[Any, ...]:
        """Returns the arguments of the function that `round_trip` makes."""
        return self.x, self.topk_idx, self.topk_weights, self.rows, self.biases


def make_topk_idx(case: Case, routing: str, seed: int = 0) -> Any:
    """Returns the ids [R, T, K] int32 that `make_data` makes for a routing."""
    return _route(case, routing, np.random.default_rng(seed))


def make_data(case: Case, routing: str, seed: int = 0) -> Data:
    """Makes normal rows and uniform weights, equal in every process."""
    rng = np.random.default_rng(seed)
    tokens = (case.num_ranks, case.num_tokens)

    def normal(*shape: int) -> Any:
        return rng.standard_normal(shape).astype(np.float32).astype(DTYPES[case.dtype])

    return Data(
        topk_idx=_route(case, routing, rng),
        topk_weights=rng.random((*tokens, case.num_topk), np.float32),
        x=normal(*tokens, case.hidden),
        rows=normal(case.num_ranks, case.capacity, case.hidden),
        biases=tuple(normal(*tokens, case.hidden) for _ in range(case.num_biases)),
    )


def _route(case: Case, routing: str, rng: np.random.Generator) -> Any:
    shape = (case.num_ranks, case.num_tokens, case.num_topk)
    return routings.BY_NAME[routing](rng, shape, case.num_experts)


def plan_of(case: Case, topk_idx: Any) -> reference.Plan:
    """Returns the reference's plan for ids [R, T, K]."""
    return reference.make_plan(
        topk_idx,
        num_experts=case.num_experts,
        layout=case.layout,
        recv_capacity=case.capacity,
        expert_alignment=case.expert_alignment,
    )


def dispatch(
    case: Case, group: jax_ep.Group, backend: str, x: Any, *routing: Any, **options: Any
) -> jax_ep.Dispatched:
    """Runs one rank's dispatch of a case; `routing`: topk_idx, and topk_weights if wanted."""
    return jax_ep.dispatch(
        x,
        *routing,
        group=group,
        num_experts=case.num_experts,
        layout=case.layout,
        recv_capacity=case.capacity,
        expert_alignment=case.expert_alignment,
        fill=case.fill,
        backend=backend,
        **options,
    )


def round_trip(
    case: Case, group: jax_ep.Group, backend: str, check_vma: bool = True
) -> Callable[..., Any]:
    """Makes (x, topk_idx, topk_weights, rows, biases) -> (Dispatched, combined).

    JAX compiles the function at its first call.
    """

    def run(x: Any, topk_idx: Any, topk_weights: Any, rows: Any, biases: Any) -> Any:
        out = dispatch(case, group, backend, x, topk_idx, topk_weights)
        weights = {None: None, "rows": out.weights, "tokens": topk_weights}[case.weights_at]
        y = jax_ep.combine(rows, out.handle, weights=weights, bias=biases, backend=backend)
        return out, y

    return on_group(run, group, check_vma=check_vma)


def assert_dispatched(case: Case, data: Data, out: jax_ep.Dispatched) -> reference.Plan:
    """Asserts every field of a dispatch to the bit, except rows of x that `fill` leaves undefined.

    Returns: the reference's plan.
    """
    plan = plan_of(case, data.topk_idx)
    is_rank_layout = case.layout == "rank"
    expected = {
        "group_sizes": plan.group_sizes,
        "num_recv": plan.num_recv[:, None],
        "num_dropped": plan.num_dropped[:, None],
        "num_invalid": plan.num_invalid[:, None],
        "weights": reference.dispatch_weights(plan, data.topk_weights),
        "topk_idx": plan.recv_topk_idx if is_rank_layout else None,
    }
    for name, value in expected.items():
        _assert_field(getattr(out, name), value, name)
    handle = {
        "recv_src": plan.recv_src,
        "recv_k": None if is_rank_layout else plan.recv_k,
        "send_row": plan.send_row,
        "send_rank": None if is_rank_layout else plan.send_rank,
        "group_sizes": plan.group_sizes,
        "num_recv": plan.num_recv[:, None],
    }
    for name, value in handle.items():
        _assert_field(getattr(out.handle, name), value, f"handle.{name}")
    is_defined = defined_rows(case, plan)
    assert_same_bits(out.x, reference.dispatch(plan, data.x), what="x", where=is_defined)
    return plan


def defined_rows(case: Case, plan: reference.Plan) -> Any:
    """Returns [R, C] bool, the rows that `fill` defines; other rows may hold anything."""
    is_defined = plan.recv_src >= 0
    if case.fill in ("zeros", "padding"):
        is_defined |= np.arange(case.capacity) < plan.num_recv[:, None]
    if case.fill == "zeros":
        is_defined[:] = True
    return is_defined


def assert_combined(
    case: Case, data: Data, plan: reference.Plan, y: Any, *, wire: str | None = None
) -> None:
    """Asserts the combined rows of `round_trip` to the bit. `wire`: as in low_latency_combine."""
    weights = None
    if case.weights_at is not None:
        weights = reference.dispatch_weights(plan, data.topk_weights)
    expected = expected_sums(case, plan, data.rows, weights, data.biases, wire=wire)
    assert_same_bits(y, expected, what="combine")


def expected_sums(case: Case, plan: reference.Plan, *operands: Any, wire: str | None = None) -> Any:
    """Returns the reference's combine of rows and, if there are any, weights and biases."""
    return reference.combine(plan, *operands, wire=wire, ranks_per_node=case.ranks_per_node)


def _assert_field(got: Any, expected: Any, name: str) -> None:
    if expected is not None:
        assert_same_bits(got, expected, what=name)
    elif got is not None:
        raise AssertionError(f"{name}: expected None, got {got.dtype}{got.shape}")
