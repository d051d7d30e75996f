"""The custom call of combine; xla_ffi/ops/combine/combine_ffi.h declares its handler."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jax_ep._src.base import limits, native_modules
from jax_ep._src.base.errors import ConfigError
from jax_ep._src.base.options import ExchangeMode, Layout, Quantize
from jax_ep._src.base.spec import RouteSpec, RowIndex
from jax_ep._src.ops.combine import stock
from jax_ep._src.ops.common.check_mesh import check_mesh
from jax_ep._src.ops.common.few_tokens import combine_kernels
from jax_ep._src.ops.common.primitive import Result, absent, make_primitive


class _Results(NamedTuple):
    """Arrays, or their shape and dtype, in the order of the handler."""

    sums: Any
    rank_mask: Any
    workspace: Any


def _results(*operands: Any, has_rank_mask: bool, workspace_bytes: int, **_: Any) -> _Results:
    send_row, rank_mask, rows = operands[2], operands[6], operands[7]
    return _Results(
        sums=Result((send_row.shape[0], *rows.shape[1:]), rows.dtype),
        rank_mask=Result(rank_mask.shape if has_rank_mask else (0,), jnp.bool_),
        workspace=Result((workspace_bytes,), jnp.uint8),
    )


ATTRIBUTES = (
    "group",
    "has_rank_mask",
    "has_weights",
    "layout",
    "mode",
    "num_biases",
    "num_sms",
    "wire",
)

_bind = make_primitive("combine", _results, platforms=("cpu", "cuda"), attributes=ATTRIBUTES)


def _workspace_bytes(spec: RouteSpec, index: RowIndex, rows: jax.Array) -> int:
    """Returns the scratch bytes of one call, for the rings of partial sums."""
    if spec.backend != "cuda":
        return 0
    num_tokens, num_slots = index.send_row.shape
    size: int = native_modules.load("cuda").combine_workspace_bytes(
        layout=spec.layout.code,
        num_ranks=spec.group.num_ranks,
        num_tokens=num_tokens,
        num_slots=num_slots,
        row_bytes=rows.shape[1] * rows.dtype.itemsize,
    )
    return size


def combine(
    spec: RouteSpec,
    index: RowIndex,
    rows: jax.Array,
    weights: jax.Array | None,
    biases: Sequence[jax.Array],
) -> jax.Array:
    """Returns [num_tokens, hidden] from rows [recv_capacity, hidden]."""
    return combine_living(spec, index, rows, weights, biases)[0]


def combine_living(
    spec: RouteSpec,
    index: RowIndex,
    rows: jax.Array,
    weights: jax.Array | None,
    biases: Sequence[jax.Array],
) -> tuple[jax.Array, jax.Array | None]:
    """Returns the rows of `combine`, and the mask of ranks after the call; None without a mask.

    XLA's collectives carry the combine if the custom call has no room to stage the operands. All
    ranks have the same room. Peers read no operands of the kernels for few tokens. The kernels for
    many tokens round no sums on their way, so XLA's collectives carry these, too.
    """
    mode, num_sms = combine_kernels(spec, index, rows)
    is_few = mode is ExchangeMode.LOW_LATENCY
    workspace_bytes = 0 if is_few else _workspace_bytes(spec, index, rows)
    operands = (rows, weights, index.send_rank, index.send_row)
    if spec.backend == "cuda":
        can_round = spec.wire is Quantize.NONE
        can_carry = is_few or (
            can_round and spec.group.can_stage(*operands, scratch_bytes=workspace_bytes)
        )
    else:
        can_carry = spec.backend == "cpu" and spec.group.can_stage(*operands)
    if not can_carry:
        return stock.combine(spec, index, rows, weights, biases), index.rank_mask
    has_rank_mask = is_few and index.rank_mask is not None
    if spec.backend == "cuda" and index.send_row.shape[1] > limits.MAX_TOPK:
        raise ConfigError(
            f"{spec.op}: backend 'cuda' takes at most {limits.MAX_TOPK} choices a token, got "
            f"{index.send_row.shape[1]}"
        )
    position = check_mesh(spec.group.position(), spec.group, op=spec.op)
    results: _Results = _bind(
        position,
        absent(jnp.int32) if index.send_rank is None else index.send_rank,
        index.send_row,
        index.recv_src if is_few else absent(jnp.int32),
        index.recv_k if is_few and spec.layout is Layout.EXPERT else absent(jnp.int32),
        absent(jnp.float32) if weights is None else weights,
        index.rank_mask if has_rank_mask else absent(jnp.bool_),
        rows,
        *biases,
        group=spec.group.identity,
        has_rank_mask=has_rank_mask,
        has_weights=weights is not None,
        layout=spec.layout,
        mode=mode,
        num_biases=len(biases),
        num_sms=num_sms,
        wire=spec.wire,
        op=spec.op,
        workspace_bytes=workspace_bytes,
    )
    return results.sums, results.rank_mask if has_rank_mask else index.rank_mask
