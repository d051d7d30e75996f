"""The primitive of dispatch; xla_ffi/ops/dispatch/dispatch_ffi.h is its other side."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jax_ep import _limits, _native
from jax_ep._primitives._base import absent, make_primitive
from jax_ep._primitives.check_mesh import check_mesh
from jax_ep._spec import DispatchSpec, Routed
from jax_ep.config import Layout
from jax_ep.errors import ConfigError


class _Results(NamedTuple):
    """Those in front of the rows, in the order of the handler: arrays, or their shape and dtype."""

    group_sizes: Any
    num_recv: Any
    num_dropped: Any
    num_invalid: Any
    recv_src: Any
    recv_k: Any
    send_row: Any
    recv_topk_idx: Any
    recv_weights: Any
    workspace: Any


def _results(
    position: Any,
    topk_idx: Any,
    topk_weights: Any,
    *rows: Any,
    has_weights: bool,
    layout: int,
    num_experts: int,
    num_ranks: int,
    recv_capacity: int,
    workspace_bytes: int,
    **_: Any,
) -> list[tuple[tuple[int, ...], Any]]:
    num_tokens, num_topk = topk_idx.shape
    is_rank_layout = layout == Layout.RANK.value
    choices = (recv_capacity, num_topk)
    weights = choices if is_rank_layout else (recv_capacity,)
    fixed = _Results(
        group_sizes=((num_experts // num_ranks,), jnp.int32),
        num_recv=((1,), jnp.int32),
        num_dropped=((1,), jnp.int32),
        num_invalid=((1,), jnp.int32),
        recv_src=((recv_capacity,), jnp.int32),
        recv_k=((0,) if is_rank_layout else (recv_capacity,), jnp.int32),
        send_row=((num_tokens, num_ranks if is_rank_layout else num_topk), jnp.int32),
        recv_topk_idx=(choices if is_rank_layout else (0,), jnp.int32),
        recv_weights=(weights if has_weights else (0,), jnp.float32),
        workspace=((workspace_bytes,), jnp.uint8),
    )
    return [*fixed, *(((recv_capacity, *r.shape[1:]), r.dtype) for r in rows)]


_bind = make_primitive(
    "dispatch",
    _results,
    platforms=("cpu", "cuda"),
    attributes=(
        "expert_alignment",
        "fill",
        "group",
        "has_weights",
        "layout",
        "num_experts",
        "num_sms",
    ),
)


def _workspace_bytes(spec: DispatchSpec, shape: tuple[int, ...]) -> int:
    if spec.backend != "cuda":
        return 0
    num_tokens, num_topk = shape
    size: int = _native.load("cuda").dispatch_workspace_bytes(
        layout=spec.layout.value,
        num_experts=spec.num_experts,
        num_ranks=spec.group.num_ranks,
        num_tokens=num_tokens,
        num_topk=num_topk,
    )
    if size == 0:
        raise ConfigError(
            f"{spec.op}: backend 'cuda' takes at most {_limits.MAX_TOPK} choices a token, and as "
            f"many experts as fit into an SM's shared memory; got num_topk={num_topk}, "
            f"num_experts={spec.num_experts}"
        )
    return size


def dispatch(
    spec: DispatchSpec,
    topk_idx: jax.Array,
    topk_weights: jax.Array | None,
    rows: Sequence[jax.Array],
) -> Routed:
    """The custom call; see Routed for what comes back."""
    position = check_mesh(spec.group.position(), spec.group, op=spec.op)
    results = _bind(
        position,
        topk_idx,
        absent(jnp.float32) if topk_weights is None else topk_weights,
        *rows,
        expert_alignment=spec.expert_alignment,
        fill=spec.fill.value,
        group=spec.group.identity,
        has_weights=topk_weights is not None,
        layout=spec.layout.value,
        num_experts=spec.num_experts,
        num_ranks=spec.group.num_ranks,
        num_sms=spec.num_sms,
        op=spec.op,
        recv_capacity=spec.recv_capacity,
        workspace_bytes=_workspace_bytes(spec, topk_idx.shape),
    )
    num_fixed = len(_Results._fields)
    fixed = _Results(*results[:num_fixed])
    is_rank_layout = spec.layout is Layout.RANK
    return Routed(
        group_sizes=fixed.group_sizes,
        num_recv=fixed.num_recv,
        num_dropped=fixed.num_dropped,
        num_invalid=fixed.num_invalid,
        recv_src=fixed.recv_src,
        recv_k=None if is_rank_layout else fixed.recv_k,
        send_row=fixed.send_row,
        recv_topk_idx=fixed.recv_topk_idx if is_rank_layout else None,
        recv_weights=None if topk_weights is None else fixed.recv_weights,
        rows=tuple(results[num_fixed:]),
    )
