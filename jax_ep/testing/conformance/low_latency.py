"""Checks of the low-latency dispatch and combine against the reference, to the bit."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_ep
from jax_ep import reference
from jax_ep.testing import routing as routings
from jax_ep.testing.cases import (
    Case,
    Data,
    assert_combined,
    assert_dispatched,
    make_data,
)
from jax_ep.testing.compare import assert_same_bits
from jax_ep.testing.conformance.check import Check, noted
from jax_ep.testing.conformance.sizes import seed_of
from jax_ep.testing.ranks import on_group

_OPS = frozenset({"low_latency_dispatch", "low_latency_combine"})


def low_latency_round_trip(
    group: jax_ep.Group,
    backend: str,
    *,
    num_sms: int | None = None,
    wire: str | None = None,
    **params: Any,
) -> None:
    """Compares every field of the dispatch, and the combined rows, for every named routing."""
    case = Case(num_ranks=group.num_ranks, fill="padding", **params)

    def run(x: Any, topk_idx: Any, topk_weights: Any, rows: Any, biases: Any) -> Any:
        out = _dispatch(case, group, backend, x, topk_idx, topk_weights, num_sms=num_sms)
        y = jax_ep.low_latency_combine(
            rows,
            out.handle,
            weights={None: None, "rows": out.weights, "tokens": topk_weights}[case.weights_at],
            bias=biases,
            wire=wire,
            num_sms=num_sms,
            backend=backend,
        )
        return out, y

    fn = on_group(run, group)
    for routing in routings.BY_NAME:
        with noted(f"routing {routing}, {case}"):
            data = make_data(case, routing, seed_of(routing))
            out, y = fn(*data.operands())
            plan = assert_dispatched(case, data, out)
            assert case.recv_capacity is not None or int(plan.num_dropped.sum()) == 0
            assert_combined(case, data, plan, y, wire=wire)


def _dispatch(
    case: Case, group: jax_ep.Group, backend: str, x: Any, *routing: Any, **options: Any
) -> jax_ep.Dispatched:
    return jax_ep.low_latency_dispatch(
        x,
        *routing,
        group=group,
        num_experts=case.num_experts,
        backend=backend,
        **{
            "layout": case.layout,
            "recv_capacity": case.recv_capacity,
            "max_tokens_per_rank": case.num_tokens,
            **options,
        },
    )


def low_latency_batches_of_experts(
    group: jax_ep.Group, backend: str, *, num_tokens: int, room: int
) -> None:
    """Compares the layout "batched", whose experts have fixed places, with the reference."""
    case = Case(num_ranks=group.num_ranks, layout="expert", num_tokens=num_tokens)
    stride = group.num_ranks * room
    capacity = case.experts_per_rank * stride
    case = replace(case, recv_capacity=capacity)

    def run(x: Any, topk_idx: Any, topk_weights: Any, rows: Any) -> Any:
        out = _dispatch(
            case,
            group,
            backend,
            x,
            topk_idx,
            topk_weights,
            layout="batched",
            recv_capacity=None,
            max_tokens_per_rank=room,
        )
        rows = rows.reshape(*out.x.shape[:2], -1)
        combine = jax_ep.low_latency_combine
        return out, combine(rows, out.handle, weights=out.weights, backend=backend)

    fn = on_group(run, group)
    for routing in routings.BY_NAME:
        with noted(f"routing {routing}"):
            data = make_data(case, routing, seed_of(routing))
            plan = reference.make_plan(
                data.topk_idx,
                num_experts=case.num_experts,
                layout="expert",
                recv_capacity=capacity,
                expert_stride=stride,
            )
            out, y = fn(data.x, data.topk_idx, data.topk_weights, data.rows)
            shape = (group.num_ranks, case.experts_per_rank, stride)
            weights = reference.dispatch_weights(plan, data.topk_weights)
            assert_same_bits(out.group_sizes, plan.group_sizes, what="group_sizes")
            assert_same_bits(out.num_recv, plan.num_recv[:, None], what="num_recv")
            assert_same_bits(out.weights, weights.reshape(shape), what="weights")
            assert_same_bits(out.handle.recv_src, plan.recv_src, what="recv_src")
            assert_same_bits(out.handle.recv_k, plan.recv_k, what="recv_k")
            assert_same_bits(out.handle.send_row, plan.send_row, what="send_row")
            expected = reference.dispatch(plan, data.x).reshape(*shape, -1)
            is_there = (plan.recv_src >= 0).reshape(shape)
            assert_same_bits(out.x, expected, what="x", where=is_there)
            combined = reference.combine(plan, data.rows, weights)
            assert_same_bits(y, combined, what="combine")


def low_latency_rows_are_rounded(
    group: jax_ep.Group, backend: str, *, layout: str, quantize: str, dtype: str
) -> None:
    """Compares rows that are rounded to fp8 on the way, and their scales, with the cast."""
    case = Case(num_ranks=group.num_ranks, layout=layout, hidden=384, dtype=dtype, fill="padding")
    data = make_data(case, "masked")
    data.x[:, 0] *= np.asarray(1e-3, data.x.dtype)
    data.x[:, 1, :128] = 0
    data.x[:, 2, 7] = np.inf
    data.x[:, 3, 200] = np.nan

    def run(x: Any, topk_idx: Any) -> Any:
        return _dispatch(case, group, backend, x, topk_idx, quantize=quantize)

    out = on_group(run, group)(data.x, data.topk_idx)
    rounded, scales = _cast(data, quantize)
    plan = _plan(case, data)
    is_there = plan.recv_src >= 0
    for name, got, sent in (("x", out.x, rounded), ("scales", out.scales, scales)):
        bits = f"u{sent.dtype.itemsize}"
        expected = reference.dispatch(plan, sent.view(bits)).view(sent.dtype)
        assert_same_bits(got, expected, what=name, where=is_there)


def _cast(data: Data, quantize: str) -> tuple[Any, Any]:
    """Returns what the reference cast makes of the rows of all ranks, on the host."""
    flat = jnp.asarray(data.x.reshape(-1, data.x.shape[-1]))
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        flat = jnp.asarray(np.asarray(flat))
        how = "f32" if quantize == "fp8" else "e8m0"
        rounded, scales = map(np.asarray, jax_ep.quantize_fp8(flat, scales=how))
    if quantize == "fp8_pow2":
        powers = (scales.astype(np.uint32) << 23).view(np.float32)
        scales = np.where(scales == 255, np.float32(np.nan), powers)
    ranks = data.x.shape[:2]
    return rounded.reshape(*ranks, -1), scales.reshape(*ranks, -1)


def _plan(case: Case, data: Data) -> reference.Plan:
    return reference.make_plan(
        data.topk_idx,
        num_experts=case.num_experts,
        layout=case.layout,
        recv_capacity=case.capacity,
    )


def low_latency_bytes_pass_unchanged(group: jax_ep.Group, backend: str, *, layout: str) -> None:
    """Dispatches rows and scales of opaque bytes, and a payload of odd rows."""
    case = Case(num_ranks=group.num_ranks, layout=layout, fill="padding")
    data = make_data(case, "balanced")
    rng = np.random.default_rng(3)
    sizes = {"x": 80, "scales": 5, "payload": 1537}
    ranks = data.x.shape[:2]
    sent = {name: rng.integers(0, 256, (*ranks, n), np.uint8) for name, n in sizes.items()}

    def run(x: Any, scales: Any, payload: Any, topk_idx: Any) -> Any:
        return _dispatch(case, group, backend, (x, scales), topk_idx, payload=payload)

    out = on_group(run, group)(*sent.values(), data.topk_idx)
    plan = _plan(case, data)
    for name, rows in sent.items():
        expected = reference.dispatch(plan, rows)
        is_there = plan.recv_src >= 0
        assert_same_bits(getattr(out, name), expected, what=name, where=is_there)


def low_latency_repeated_expert(group: jax_ep.Group, backend: str, *, layout: str) -> None:
    """Names an expert twice in a token: a caller's error, but with a defined result."""
    case = Case(num_ranks=group.num_ranks, layout=layout, num_tokens=40, fill="padding")
    data = make_data(case, "balanced")
    data.topk_idx[:, ::2, 1] = data.topk_idx[:, ::2, 0]

    def run(x: Any, topk_idx: Any, topk_weights: Any, rows: Any, biases: Any) -> Any:
        out = _dispatch(case, group, backend, x, topk_idx, topk_weights)
        return out, jax_ep.low_latency_combine(rows, out.handle, bias=biases, backend=backend)

    out, y = on_group(run, group)(*data.operands())
    assert_combined(case, data, assert_dispatched(case, data, out), y)


def _checks() -> Iterator[Check]:
    def check(run: Any, **params: Any) -> Check:
        return Check(run, _OPS, params)

    for layout in ("rank", "expert"):
        at = [None] if layout == "rank" else [None, "rows", "tokens"]
        # Rows of one to three groups of packets; the reference takes long for many wide ones.
        for i, (num_tokens, *widths) in enumerate(
            ((1, 24, 1544, 800), (12, 24, 1544, 800), (33, 24, 264, 800), (100, 24, 136, 264))
        ):
            for j, num_topk in enumerate((1, 3, 8)):
                yield check(
                    low_latency_round_trip,
                    layout=layout,
                    num_tokens=num_tokens,
                    num_topk=num_topk,
                    experts_per_rank=8,
                    hidden=widths[(i + j) % 3],
                    dtype=("bf16", "f32", "f16")[(i + 2 * j) % 3],
                    num_biases=(i + j) % 3,
                    weights_at=at[(i + j) % len(at)],
                    num_sms=(None, 1, 5)[j],
                )
        yield check(low_latency_round_trip, layout=layout, num_topk=22, experts_per_rank=32)
        for i, dtype in enumerate(("bf16", "f32", "f16")):
            yield check(
                low_latency_round_trip,
                layout=layout,
                num_tokens=(33, 12, 1)[i],
                num_topk=(8, 3, 1)[i],
                experts_per_rank=8,
                hidden=(384, 1536, 2048)[i],
                dtype=dtype,
                num_biases=i,
                weights_at=at[i % len(at)],
                wire="fp8",
            )
        # The kernels for many tokens carry what might be dropped.
        yield check(low_latency_round_trip, layout=layout, num_tokens=9, recv_capacity=8)
        yield check(low_latency_bytes_pass_unchanged, layout=layout)
        yield check(low_latency_repeated_expert, layout=layout)
        for quantize in ("fp8", "fp8_pow2", "fp8_e8m0"):
            dtype = {"fp8": "bf16", "fp8_pow2": "f16", "fp8_e8m0": "f32"}[quantize]
            yield check(low_latency_rows_are_rounded, layout=layout, quantize=quantize, dtype=dtype)
    yield check(low_latency_batches_of_experts, num_tokens=12, room=12)
    yield check(low_latency_batches_of_experts, num_tokens=1, room=7)


CHECKS = tuple(_checks())
FULL = CHECKS
