"""Checks of programs with x64 on: ids of 64 bits, and results equal to those with x64 off."""

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_ep
from jax_ep import reference
from jax_ep._src.base.errors import DTypeError
from jax_ep.testing.cases import (
    Case,
    assert_combined,
    assert_dispatched,
    dispatch,
    make_data,
)
from jax_ep.testing.cases import round_trip as compile_round_trip
from jax_ep.testing.compare import assert_same_bits
from jax_ep.testing.conformance.check import ROUND_TRIP, Check
from jax_ep.testing.conformance.gradient_bits import gradients_to_the_bit
from jax_ep.testing.conformance.sizes import make_case, seed_of
from jax_ep.testing.ranks import on_group


def with_x64(group: jax_ep.Group, backend: str, *, layout: str, weights_at: str | None) -> None:
    """Passes ids beyond 32 bits (invalid), payloads of 64 bits (moved) and f64 (refused)."""
    case = make_case(
        group, layout=layout, dtype="f32", capacity="short", row_bytes=64, weights_at=weights_at
    )
    data = make_data(case, "masked", seed_of("masked"))
    ids = data.topk_idx.astype(np.int64)
    ids[:, ::3, 0] += 2**32  # the low 32 bits are unchanged
    ids[:, ::4, 1] -= 2**33
    data = replace(data, topk_idx=ids)
    payload = np.random.default_rng(8).standard_normal((*ids.shape[:2], 3))
    with jax.enable_x64(True):
        out, y = compile_round_trip(case, group, backend)(*data.operands())
        plan = assert_dispatched(case, data, out)
        assert_combined(case, data, plan, y)

        def others(x: Any, ids: Any, weights: Any, payload: Any) -> Any:
            for start, call in _refused(case, group, backend, (x, ids)).items():
                message = _message_of(call)
                assert re.match(rf"{start}\b.* got float64", message), f"{start}: {message}"
            out = dispatch(case, group, backend, x, ids, payload=payload)
            counts = jax_ep.get_dispatch_layout(
                ids, num_experts=case.num_experts, group=group, backend=backend
            )
            return out.payload, counts.num_tokens_per_expert

        moved, counts = on_group(others, group)(data.x, ids, data.topk_weights, payload)
        assert_same_bits(moved, reference.dispatch(plan, payload), what="payload")
        layouts = reference.get_dispatch_layout(
            ids, num_experts=case.num_experts, ranks_per_node=group.ranks_per_node
        )
        assert_same_bits(counts, layouts[2], what="num_tokens_per_expert")


def gradients_with_x64(
    group: jax_ep.Group, backend: str, *, layout: str, weights_at: str | None
) -> None:
    """Compares gradients to the bit; they have the operands' dtypes."""
    with jax.enable_x64(True):
        gradients_to_the_bit(
            group, backend, layout=layout, dtype="f32", capacity="half", weights_at=weights_at
        )


def _refused(
    case: Case, group: jax_ep.Group, backend: str, operands: tuple[Any, Any]
) -> dict[str, Callable[[], Any]]:
    """Returns calls with one operand of f64; the keys are the beginnings of their messages."""
    x, ids = operands
    handle = dispatch(case, group, backend, x, ids).handle
    wide_x = x.astype(jnp.float64)
    rows = jnp.zeros((case.capacity, case.hidden), jnp.float32)
    pair = (jnp.zeros(x.shape, jnp.float8_e4m3fn), wide_x)
    send = partial(dispatch, case, group, backend)
    back = partial(jax_ep.combine, handle=handle, backend=backend)
    add = partial(jax_ep.all_reduce, group=group, allow_psum=False, backend=backend)
    return {
        "dispatch: x": lambda: send(wide_x, ids),
        "dispatch: scales": lambda: send(pair, ids),
        "combine: rows": lambda: back(rows.astype(jnp.float64)),
        "combine: bias": lambda: back(rows, bias=wide_x),
        "all_reduce: x": lambda: add(wide_x),
    }


def _message_of(call: Callable[[], Any]) -> str:
    try:
        call()
    except DTypeError as error:
        return str(error)
    return "nothing was raised"


_OPS = ROUND_TRIP | {"combine_weights", "get_dispatch_layout", "all_reduce"}
_RANK, _EXPERT = (
    {"layout": layout, "weights_at": at} for layout, at in (("rank", None), ("expert", "tokens"))
)
CHECKS = (
    Check(with_x64, _OPS, _RANK),
    Check(with_x64, _OPS, _EXPERT),
    Check(gradients_with_x64, _OPS, _EXPERT),
)
FULL = (*CHECKS, Check(gradients_with_x64, _OPS, _RANK))
