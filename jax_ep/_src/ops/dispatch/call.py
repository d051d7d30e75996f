"""The custom call of dispatch; xla_ffi/ops/dispatch/dispatch_ffi.h declares its handler."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jax_ep._src.base import limits, native_modules
from jax_ep._src.base.errors import ConfigError
from jax_ep._src.base.options import ExchangeMode, Layout, Quantize
from jax_ep._src.base.spec import DispatchResults, DispatchSpec
from jax_ep._src.ops.common.check_mesh import check_mesh
from jax_ep._src.ops.common.few_tokens import dispatch_kernels, sent_rows
from jax_ep._src.ops.common.primitive import Result, absent, make_primitive
from jax_ep._src.ops.dispatch import stock
from jax_ep._src.ops.dispatch.fp8 import round_rows


class Results(NamedTuple):
    """Arrays, or their shape and dtype, in the order of the handler; without scratch."""

    group_sizes: Any
    num_recv: Any
    num_dropped: Any
    num_invalid: Any
    recv_src: Any
    recv_k: Any
    send_row: Any
    recv_topk_idx: Any
    recv_weights: Any
    rows: tuple[Any, ...]


class _Results(NamedTuple):
    """The same with scratch. The names of the first fields are those of Results."""

    group_sizes: Any
    num_recv: Any
    num_dropped: Any
    num_invalid: Any
    recv_src: Any
    recv_k: Any
    send_row: Any
    recv_topk_idx: Any
    recv_weights: Any
    rank_mask: Any
    workspace: Any
    rows: tuple[Any, ...]


def results_without_workspace(
    position: Any,
    topk_idx: Any,
    topk_weights: Any,
    *rows: Any,
    has_weights: bool,
    layout: Layout,
    num_experts: int,
    num_ranks: int,
    quantize: Quantize,
    recv_capacity: int,
    **_: Any,
) -> Results:
    """The shape rule of a dispatch, without scratch."""
    tokens_per_rank, num_topk = topk_idx.shape
    is_rank_layout = layout is Layout.RANK
    choices = (recv_capacity, num_topk)
    weights = choices if is_rank_layout else (recv_capacity,)
    return Results(
        group_sizes=Result((num_experts // num_ranks,), jnp.int32),
        num_recv=Result((1,), jnp.int32),
        num_dropped=Result((1,), jnp.int32),
        num_invalid=Result((1,), jnp.int32),
        recv_src=Result((recv_capacity,), jnp.int32),
        recv_k=Result((0,) if is_rank_layout else (recv_capacity,), jnp.int32),
        send_row=Result((tokens_per_rank, num_ranks if is_rank_layout else num_topk), jnp.int32),
        recv_topk_idx=Result(choices if is_rank_layout else (0,), jnp.int32),
        recv_weights=Result(weights if has_weights else (0,), jnp.float32),
        rows=tuple(
            Result((recv_capacity, *width), dtype) for width, dtype in sent_rows(rows, quantize)
        ),
    )


def _results(
    position: Any,
    topk_idx: Any,
    topk_weights: Any,
    rank_mask: Any,
    *rows: Any,
    has_rank_mask: bool,
    workspace_bytes: int,
    **parameters: Any,
) -> _Results:
    results = results_without_workspace(position, topk_idx, topk_weights, *rows, **parameters)
    return _Results(
        rank_mask=Result(rank_mask.shape if has_rank_mask else (0,), jnp.bool_),
        workspace=Result((workspace_bytes,), jnp.uint8),
        **results._asdict(),
    )


ATTRIBUTES = (
    "expert_alignment",
    "expert_stride",
    "fill",
    "group",
    "has_rank_mask",
    "has_weights",
    "layout",
    "mode",
    "num_experts",
    "num_parts",
    "num_sms",
    "quantize",
)


_bind = make_primitive(
    "dispatch",
    _results,
    platforms=("cpu", "cuda"),
    attributes=ATTRIBUTES,
)


def _workspace_bytes(
    spec: DispatchSpec, shape: tuple[int, ...], num_parts: int, mode: ExchangeMode
) -> int:
    if spec.backend != "cuda" or mode is ExchangeMode.LOW_LATENCY:
        return 0
    tokens_per_rank, num_topk = shape
    size: int = native_modules.load("cuda").dispatch_workspace_bytes(
        layout=spec.layout.code,
        num_experts=spec.num_experts,
        num_ranks=spec.group.num_ranks,
        num_tokens=tokens_per_rank // num_parts,
        num_topk=num_topk,
        num_parts=num_parts,
    )
    if size == 0:
        raise ConfigError(
            f"{spec.op}: backend 'cuda' takes at most {limits.MAX_TOPK} choices a token, and as "
            f"many experts as fit into an SM's shared memory; got num_topk={num_topk}, "
            f"num_experts={spec.num_experts}"
        )
    return size


def is_carried(
    spec: DispatchSpec,
    topk_idx: jax.Array,
    topk_weights: jax.Array | None,
    rows: Sequence[jax.Array],
) -> bool:
    """Returns whether the custom call for many tokens can carry a dispatch."""
    # Its kernels leave no rows between the experts.
    has_kernels = spec.backend != "xla" and not (spec.expert_stride and spec.backend == "cuda")
    return has_kernels and spec.group.can_stage(topk_idx, topk_weights, *rows)


def dispatch(
    spec: DispatchSpec,
    topk_idx: jax.Array,
    topk_weights: jax.Array | None,
    rows: Sequence[jax.Array],
    rank_mask: jax.Array | None = None,
    *,
    num_parts: int = 1,
) -> DispatchResults:
    """Routes the tokens and moves their rows.

    `num_parts`: with P parts the tokens [P * T] of each of R ranks are those of P sources, one part
    behind the other. Part p of rank r is source p * R + r. Rows of the results are in the order of
    sources and tokens, and recv_src is source * T + token. The kernels for few tokens know of no
    parts.

    XLA's collectives carry the dispatch if the custom call has no room to stage the operands. All
    ranks have the same room. Peers read no operands of the kernels for few tokens.

    Only the kernels for few tokens know of masks. For the others, choices that lead to or from a
    rank that is left out are none.
    """
    mode, num_sms = ExchangeMode.THROUGHPUT, spec.num_sms
    if num_parts == 1:
        mode, num_sms = dispatch_kernels(spec, topk_idx.shape, rows)
    is_few = mode is ExchangeMode.LOW_LATENCY
    is_custom = is_few or is_carried(spec, topk_idx, topk_weights, rows)
    if rank_mask is not None and not is_few:
        topk_idx = _living_choices(spec, topk_idx, rank_mask)
    if spec.quantize is not Quantize.NONE and not is_few:
        rows = (*round_rows(rows[0], spec.quantize), *rows[1:])
    if not is_custom:
        routed = stock.dispatch(spec, topk_idx, topk_weights, rows, num_parts=num_parts)
        return routed._replace(rank_mask=rank_mask)
    has_rank_mask = rank_mask is not None and is_few
    position = check_mesh(spec.group.position(), spec.group, op=spec.op)
    results: _Results = _bind(
        position,
        topk_idx,
        absent(jnp.float32) if topk_weights is None else topk_weights,
        rank_mask if has_rank_mask else absent(jnp.bool_),
        *rows,
        expert_alignment=spec.expert_alignment,
        expert_stride=spec.expert_stride,
        fill=spec.fill,
        group=spec.group.identity,
        has_rank_mask=has_rank_mask,
        has_weights=topk_weights is not None,
        layout=spec.layout,
        mode=mode,
        num_experts=spec.num_experts,
        num_parts=num_parts,
        num_ranks=spec.group.num_ranks,
        num_sms=num_sms,
        op=spec.op,
        quantize=spec.quantize if is_few else Quantize.NONE,
        recv_capacity=spec.recv_capacity,
        workspace_bytes=_workspace_bytes(spec, topk_idx.shape, num_parts, mode),
    )
    return as_results(spec, results, has_weights=topk_weights is not None)._replace(
        rank_mask=results.rank_mask if has_rank_mask else rank_mask
    )


def as_results(
    spec: DispatchSpec, results: Results | _Results, *, has_weights: bool
) -> DispatchResults:
    """Returns the results of a handler without those that stand for nothing."""
    is_rank_layout = spec.layout is Layout.RANK
    return DispatchResults(
        group_sizes=results.group_sizes,
        num_recv=results.num_recv,
        num_dropped=results.num_dropped,
        num_invalid=results.num_invalid,
        recv_src=results.recv_src,
        recv_k=None if is_rank_layout else results.recv_k,
        send_row=results.send_row,
        recv_topk_idx=results.recv_topk_idx if is_rank_layout else None,
        recv_weights=results.recv_weights if has_weights else None,
        rows=results.rows,
    )


def _living_choices(spec: DispatchSpec, topk_idx: jax.Array, rank_mask: jax.Array) -> jax.Array:
    """Returns topk_idx with -1 for experts of ranks that are left out; on such a rank, for all."""
    is_expert = (topk_idx >= 0) & (topk_idx < spec.num_experts)
    to = jnp.where(is_expert, topk_idx // spec.num_local_experts, 0)
    takes_part = rank_mask[to] & rank_mask[jax.lax.axis_index(spec.group.axes)]
    return jnp.where(is_expert & ~takes_part, -1, topk_idx)
