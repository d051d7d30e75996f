"""Checks of dispatches along a handle, of fp8 pairs, and of payloads."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_ep
from jax_ep import reference
from jax_ep.testing import routing as routings
from jax_ep.testing.cases import DTYPES, defined_rows, dispatch, make_data, plan_of
from jax_ep.testing.compare import assert_same_bits, shards
from jax_ep.testing.conformance.check import Check, noted
from jax_ep.testing.conformance.sizes import FILLS, LAYOUTS, make_case
from jax_ep.testing.ranks import on_group

_FP8 = {"e4m3fn": jnp.float8_e4m3fn, "e5m2": jnp.float8_e5m2}
_SCALES: dict[str, Any] = {"f32": np.float32, "e8m0": np.uint8, "e8m0fnu": jnp.float8_e8m0fnu}
_COUNTS = ("group_sizes", "num_recv", "num_dropped", "num_invalid")


def other_rows_along_a_handle(
    group: jax_ep.Group, backend: str, *, layout: str, capacity: str
) -> None:
    """Sends other rows along a handle: they go where the first rows went, and counts stay."""
    case = make_case(group, layout=layout, capacity=capacity)

    def fn(x: Any, ids: Any, other: Any) -> Any:
        out = dispatch(case, group, backend, x, ids)
        return out, jax_ep.dispatch(other, handle=out.handle, backend=backend)

    compiled = on_group(fn, group)
    for routing in routings.BY_NAME:
        with noted(f"routing {routing}"):
            data, other = make_data(case, routing), make_data(case, routing, seed=1)
            plan = plan_of(case, data.topk_idx)
            out, again = compiled(data.x, data.topk_idx, other.x)
            assert again.topk_idx is None
            assert again.weights is None
            for sent, got in ((data.x, out), (other.x, again)):
                assert_same_bits(got.x, reference.dispatch(plan, sent), what="x")
                counts = (plan.num_recv, plan.num_dropped, plan.num_invalid)
                expected = (plan.group_sizes, *(count[:, None] for count in counts))
                for name, value in zip(_COUNTS, expected, strict=True):
                    assert_same_bits(getattr(got, name), value, what=name)
                    assert_same_bits(getattr(got.handle, name), value, what=f"handle.{name}")
                _assert_handle(plan, got.handle)


def _assert_handle(plan: reference.Plan, handle: jax_ep.DispatchHandle) -> None:
    assert_same_bits(handle.recv_src, plan.recv_src, what="handle.recv_src")
    assert_same_bits(handle.send_row, plan.send_row, what="handle.send_row")
    if plan.layout == "expert":
        assert_same_bits(handle.recv_k, plan.recv_k, what="handle.recv_k")
        assert_same_bits(handle.send_rank, plan.send_rank, what="handle.send_rank")


def fp8_pair_and_payload(
    group: jax_ep.Group, backend: str, *, layout: str, fp8: str, scales: str, fill: str
) -> None:
    """Compares every bit of fp8 rows, scales and payload, routed and along a handle."""
    alignment = 4 if layout == "expert" else 1
    case = make_case(group, layout=layout, expert_alignment=alignment, fill=fill)
    data = make_data(case, "skewed")
    rng = np.random.default_rng(3)
    tokens, kind = data.x.shape[:2], np.dtype(_SCALES[scales])
    sent = {
        "x": rng.integers(0, 256, (*tokens, 32), np.uint8).view(_FP8[fp8]),
        "scales": rng.integers(0, 256, (*tokens, 3 * kind.itemsize), np.uint8).view(kind),
        "payload": rng.integers(-1000, 1000, (*tokens, 5)).astype(np.int16),
    }

    def fn(sent: Any, ids: Any) -> Any:
        pair, payload = (sent["x"], sent["scales"]), sent["payload"]
        out = dispatch(case, group, backend, pair, ids, payload=payload)
        return out, jax_ep.dispatch(pair, handle=out.handle, payload=payload, backend=backend)

    plan = plan_of(case, data.topk_idx)
    routed, along = on_group(fn, group)(sent, data.topk_idx)
    # A dispatch along a handle fills all other rows with zeros.
    for form, out, where in (("routed", routed, defined_rows(case, plan)), ("along", along, None)):
        for name, rows in sent.items():
            assert_same_bits(
                getattr(out, name),
                _moved(plan, rows),
                what=f"{form} {name}",
                where=where,
                nan_bits=True,
            )


def dispatch_fp8(
    group: jax_ep.Group, backend: str, *, layout: str, scales: str, dtype: str
) -> None:
    """Compares values with quantise, dispatch and dequantise, and gradients with dispatch's."""
    case = make_case(group, layout=layout, dtype=dtype, row_bytes=1024)
    data = make_data(case, "balanced")
    block = case.hidden // 2

    def fn(x: Any, weights: Any, ids: Any, cotangent: Any) -> Any:
        def through_fp8(x: Any, weights: Any) -> Any:
            out = jax_ep.dispatch_fp8(
                x, ids, weights, scales=scales, block=block, group=group,
                num_experts=case.num_experts, layout=layout, recv_capacity=case.capacity,
                backend=backend,
            )  # fmt: skip
            return out.x, out.weights

        def plain(x: Any, weights: Any) -> Any:
            out = dispatch(case, group, backend, x, ids, weights)
            return out.x, out.weights

        (y, w), vjp = jax.vjp(through_fp8, x, weights)
        return y, vjp((cotangent, w)), jax.vjp(plain, x, weights)[1]((cotangent, w))

    operands = (data.x, data.topk_weights, data.topk_idx, data.rows)
    y, grads, expected = on_group(fn, group)(*operands)
    rounded = [
        jax_ep.dequantize_fp8(
            *jax_ep.quantize_fp8(jnp.asarray(x), scales=scales, block=block), DTYPES[dtype]
        )
        for x in data.x
    ]
    plan = plan_of(case, data.topk_idx)
    assert_same_bits(y, reference.dispatch(plan, np.stack([np.asarray(r) for r in rounded])))
    for a, b in zip(grads, expected, strict=True):
        for (_, got), (_, wanted) in zip(shards(a), shards(b), strict=True):
            assert_same_bits(got, wanted, what="gradient")


def other_widths_along_a_handle(group: jax_ep.Group, backend: str, *, layout: str) -> None:
    """Sends rows of other dtypes and sizes, and fp8 pairs, along the handle of the first rows."""
    alignment = 3 if layout == "expert" else 1
    case = make_case(group, layout=layout, expert_alignment=alignment, capacity="half")
    data = make_data(case, "masked")
    rng = np.random.default_rng(4)
    tokens = data.x.shape[:2]

    def patterns(dtype: Any, width: int) -> Any:
        return rng.integers(0, 256, (*tokens, width * np.dtype(dtype).itemsize), np.uint8).view(
            dtype
        )

    widths = (("f32", 4), ("f32", 1028), ("f16", 24), ("bf16", 8))
    others = [patterns(DTYPES[name], width) for name, width in widths]
    pair = (patterns(_FP8["e4m3fn"], 48), patterns(np.uint8, 5))

    def fn(x: Any, ids: Any, others: Any, pair: Any) -> Any:
        handle = dispatch(case, group, backend, x, ids).handle
        outs = [jax_ep.dispatch(rows, handle=handle, backend=backend) for rows in (*others, pair)]
        return [out.x for out in outs], outs[-1].scales

    plan = plan_of(case, data.topk_idx)
    rows, scales = on_group(fn, group)(data.x, data.topk_idx, others, pair)
    for got, sent in zip((*rows, scales), (*others, *pair), strict=True):
        assert_same_bits(got, _moved(plan, sent), what=f"{sent.dtype}{sent.shape}", nan_bits=True)


def _moved(plan: reference.Plan, sent: Any) -> Any:
    """Dispatches the bits of rows by the reference: NumPy does not change bits."""
    return reference.dispatch(plan, sent.view(f"u{sent.dtype.itemsize}")).view(sent.dtype)


_DISPATCH = frozenset({"dispatch"})
_LAYOUT_AND_CAPACITY = [
    {"layout": lay, "capacity": c} for lay in LAYOUTS for c in ("ample", "half")
]
CHECKS = (
    *(Check(other_rows_along_a_handle, _DISPATCH, params) for params in _LAYOUT_AND_CAPACITY),
    *(Check(other_widths_along_a_handle, _DISPATCH, {"layout": layout}) for layout in LAYOUTS),
    *(
        Check(
            fp8_pair_and_payload,
            _DISPATCH,
            {"layout": layout, "fp8": fp8, "scales": scales, "fill": fill},
        )
        for layout in LAYOUTS
        for (fp8, scales), fill in zip(
            itertools.product(_FP8, _SCALES), itertools.cycle(FILLS), strict=False
        )
    ),
    *(
        Check(
            dispatch_fp8,
            _DISPATCH | {"dispatch_fp8"},
            {"layout": layout, "scales": scales, "dtype": dtype},
        )
        for layout in LAYOUTS
        for scales in ("f32", "e8m0")
        for dtype in ("bf16", "f32")
    ),
)
FULL = CHECKS
