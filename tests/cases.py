"""One problem, three ways: the operations on a mesh, compiled once per shape, and the reference."""

import functools
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
import numpy as np

import jax_ep
from jax_ep import reference
from jax_ep.testing import routing as routings
from jax_ep.testing.compare import assert_same_bits
from jax_ep.testing.ranks import on_ranks

ROUTINGS = {r.__name__: r for r in routings.ALL}


@dataclass(frozen=True)
class Case:
    """The static facts of a round trip."""

    num_ranks: int
    layout: str
    num_tokens: int = 12
    num_topk: int = 3
    experts_per_rank: int = 4
    hidden: int = 24
    dtype: Any = jnp.bfloat16
    recv_capacity: int | None = None
    expert_alignment: int = 1
    fill: str = "zeros"
    num_biases: int = 0
    weights_at: str | None = field(default=None)  # of combine: None, "rows" or "tokens"

    @property
    def num_experts(self) -> int:
        return self.num_ranks * self.experts_per_rank

    @property
    def capacity(self) -> int:
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
    """Arrays [R, ...] of a case."""

    topk_idx: Any
    topk_weights: Any
    x: Any
    rows: Any  # what the experts made
    biases: tuple[Any, ...]


def make_data(case: Case, routing: str, seed: int = 0) -> Data:
    rng = np.random.default_rng(seed)
    tokens = (case.num_ranks, case.num_tokens)

    def normal(*shape: int) -> Any:
        return rng.standard_normal(shape).astype(np.float32).astype(case.dtype)

    return Data(
        topk_idx=ROUTINGS[routing](rng, (*tokens, case.num_topk), case.num_experts),
        topk_weights=rng.random((*tokens, case.num_topk), np.float32),
        x=normal(*tokens, case.hidden),
        rows=normal(case.num_ranks, case.capacity, case.hidden),
        biases=tuple(normal(*tokens, case.hidden) for _ in range(case.num_biases)),
    )


def plan_of(case: Case, data: Data) -> reference.Plan:
    return reference.make_plan(
        data.topk_idx,
        num_experts=case.num_experts,
        layout=case.layout,
        recv_capacity=case.capacity,
        expert_alignment=case.expert_alignment,
    )


def dispatch(case: Case, group: jax_ep.Group, backend: str, *arrays: Any) -> jax_ep.Dispatched:
    return jax_ep.dispatch(
        *arrays,
        group=group,
        num_experts=case.num_experts,
        layout=case.layout,
        recv_capacity=case.capacity,
        expert_alignment=case.expert_alignment,
        fill=case.fill,
        backend=backend,
    )


@functools.cache
def round_trip(case: Case, group: jax_ep.Group, backend: str, check_vma: bool = True) -> Any:
    """Compiled: (x, topk_idx, topk_weights, rows, biases) -> (Dispatched, combined)."""

    def run(x: Any, topk_idx: Any, topk_weights: Any, rows: Any, biases: Any) -> Any:
        out = dispatch(case, group, backend, x, topk_idx, topk_weights)
        weights = {None: None, "rows": out.weights, "tokens": topk_weights}[case.weights_at]
        y = jax_ep.combine(rows, out.handle, weights=weights, bias=biases, backend=backend)
        return out, y

    return on_ranks(run, group.mesh, check_vma=check_vma)


def run(case: Case, group: jax_ep.Group, backend: str, data: Data, **options: Any) -> Any:
    fn = round_trip(case, group, backend, **options)
    return fn(data.x, data.topk_idx, data.topk_weights, data.rows, data.biases)


def assert_dispatched(case: Case, data: Data, out: jax_ep.Dispatched) -> reference.Plan:
    """Every field of a dispatch, to the bit, but for rows of x that `fill` leaves open."""
    plan = plan_of(case, data)
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
    is_defined = plan.recv_src >= 0
    if case.fill in ("zeros", "padding"):
        is_defined |= np.arange(case.capacity) < plan.num_recv[:, None]
    if case.fill == "zeros":
        is_defined[:] = True
    expected_x = reference.dispatch(plan, np.asarray(data.x))
    assert_same_bits(np.asarray(out.x)[is_defined], expected_x[is_defined], what="x")
    return plan


def assert_combined(case: Case, data: Data, plan: reference.Plan, y: Any) -> None:
    weights = None
    if case.weights_at is not None:
        weights = reference.dispatch_weights(plan, data.topk_weights)
    expected = reference.combine(plan, np.asarray(data.rows), weights, data.biases)
    assert_same_bits(y, expected, what="combine")


def _assert_field(got: Any, expected: Any, name: str) -> None:
    if expected is None:
        assert got is None, name
    else:
        assert_same_bits(got, expected, what=name)
