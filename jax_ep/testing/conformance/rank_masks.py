"""Checks of low-latency dispatches and combines that leave ranks out, to the bit."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np

import jax_ep
from jax_ep import reference
from jax_ep.testing.cases import Case, make_data
from jax_ep.testing.compare import assert_same_bits
from jax_ep.testing.conformance.check import Check, noted
from jax_ep.testing.conformance.low_latency import _OPS, _cast
from jax_ep.testing.ranks import on_group

_QUANTIZED = "fp8"


def low_latency_leaves_ranks_out(
    group: jax_ep.Group, backend: str, *, layout: str, quantize: str | None = None, **params: Any
) -> None:
    """Compares all results for masks that leave out more and more ranks, down to all of them."""
    is_batched = layout == "batched"
    case = Case(
        num_ranks=group.num_ranks,
        layout="expert" if is_batched else layout,
        fill="padding",
        experts_per_rank=4,
        **params,
    )
    stride = group.num_ranks * case.num_tokens if is_batched else 0
    if is_batched:
        case = replace(case, recv_capacity=case.experts_per_rank * stride)
    data = make_data(case, "masked")

    def run(operands: Any, mask: Any) -> Any:
        x, ids, topk_weights, rows, biases = operands
        out = jax_ep.low_latency_dispatch(
            x,
            ids,
            topk_weights,
            group=used,
            num_experts=case.num_experts,
            max_tokens_per_rank=case.num_tokens,
            layout=layout,
            quantize=quantize,
            rank_mask=mask,
            backend=backend,
        )
        y, after = jax_ep.low_latency_combine(
            rows.reshape(*out.x.shape[:-1], -1),
            out.handle,
            weights=None if layout == "rank" else out.weights,
            bias=biases,
            return_rank_mask=True,
            backend=backend,
        )
        return out, y, after

    sent = (data.x,) if quantize is None else _cast(data, quantize)
    with _to_spoil(group, backend, name=f"masks_{layout}_{quantize}") as used:
        fn = on_group(run, used)
        for mask in _masks(group.num_ranks):
            with noted(f"mask {mask}"):
                masks = np.tile(mask, (group.num_ranks, 1))
                out, y, after = fn(data.operands(), masks)
                plan = reference.make_plan(
                    data.topk_idx,
                    num_experts=case.num_experts,
                    layout=case.layout,
                    recv_capacity=case.capacity,
                    expert_stride=stride,
                    rank_mask=mask,
                )
                _compare(plan, out, sent, data.topk_weights)
                weights = reference.dispatch_weights(plan, data.topk_weights)
                at_rows = None if layout == "rank" else weights
                combined = reference.combine(plan, data.rows, at_rows, data.biases)
                assert_same_bits(y, combined, what="combine")
                for got in (out.rank_mask, after):
                    assert_same_bits(got, masks, what="rank_mask")


def _masks(num_ranks: int) -> list[Any]:
    """Returns masks of which each leaves out the ranks of the one before, and more."""
    counts = sorted({num_ranks, num_ranks - 1, 1, 0}, reverse=True)
    return [np.arange(num_ranks) < count for count in counts]


def _to_spoil(
    group: jax_ep.Group, backend: str, *, name: str
) -> AbstractContextManager[jax_ep.Group]:
    """Returns a group for masks: on GPUs one of its own, since a rank stays left out there."""
    if backend != "cuda":
        return nullcontext(group)
    return jax_ep.Group.open(
        group.mesh,
        group.axes,
        name=f"{group.name}_{name}",
        timeout=group.timeout,
        low_latency_bytes=group.low_latency_bytes,
    )


def _compare(
    plan: reference.Plan, out: jax_ep.Dispatched, sent: tuple[Any, ...], topk_weights: Any
) -> None:
    """Compares a dispatch with the reference's. `sent`: x as it travels, and its scales."""
    counts = ("num_recv", "num_dropped", "num_invalid")
    expected = {
        **{name: getattr(plan, name)[:, None] for name in counts},
        "group_sizes": plan.group_sizes,
        "weights": reference.dispatch_weights(plan, topk_weights).reshape(out.weights.shape)
        if out.weights is not None
        else None,
    }
    if plan.layout == "rank":
        expected["topk_idx"] = plan.recv_topk_idx
    for name, value in expected.items():
        assert_same_bits(getattr(out, name), value, what=name)
    assert_same_bits(out.handle.recv_src, plan.recv_src, what="recv_src")
    assert_same_bits(out.handle.send_row, plan.send_row, what="send_row")
    is_there = plan.recv_src >= 0
    for name, rows in zip(("x", "scales"), sent, strict=False):
        bits = f"u{rows.dtype.itemsize}"
        wanted = reference.dispatch(plan, rows.view(bits)).view(rows.dtype)
        got = getattr(out, name)
        assert_same_bits(
            got, wanted.reshape(got.shape), what=name, where=is_there.reshape(got.shape[:-1])
        )


def _checks() -> Iterator[Check]:
    for layout, num_tokens, num_topk, dtype, num_biases, quantize in (
        ("rank", 12, 3, "bf16", 1, None),
        ("expert", 33, 3, "f32", 0, None),
        ("expert", 5, 2, "bf16", 2, _QUANTIZED),
        ("batched", 7, 4, "f16", 0, None),
    ):
        yield Check(
            low_latency_leaves_ranks_out,
            _OPS,
            {
                "layout": layout,
                "num_tokens": num_tokens,
                "num_topk": num_topk,
                "dtype": dtype,
                "num_biases": num_biases,
                "hidden": 384 if quantize else 264,
                "quantize": quantize,
            },
        )


CHECKS = tuple(_checks())
FULL = CHECKS
