"""The primitive of combine; xla_ffi/ops/combine/combine_ffi.h is its other side."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jax_ep import _limits, _native
from jax_ep._primitives._base import absent, make_primitive
from jax_ep._primitives.check_mesh import check_mesh
from jax_ep._spec import CombineSpec, RowIndex
from jax_ep.errors import ConfigError


def _results(
    position: Any,
    send_rank: Any,
    send_row: Any,
    weights: Any,
    rows: Any,
    *biases: Any,
    workspace_bytes: int,
    **_: Any,
) -> list[tuple[tuple[int, ...], Any]]:
    return [
        ((send_row.shape[0], *rows.shape[1:]), rows.dtype),
        ((workspace_bytes,), jnp.uint8),
    ]


_bind = make_primitive(
    "combine",
    _results,
    platforms=("cpu", "cuda"),
    attributes=("group", "has_weights", "layout", "num_sms"),
)


def combine_workspace_bytes(spec: CombineSpec, index: RowIndex, rows: jax.Array) -> int:
    """Scratch of one call: the rings of partial sums."""
    if spec.backend != "cuda":
        return 0
    num_tokens, num_slots = index.send_row.shape
    size: int = _native.load("cuda").combine_workspace_bytes(
        layout=spec.layout.value,
        num_ranks=spec.group.num_ranks,
        num_tokens=num_tokens,
        num_slots=num_slots,
        row_bytes=rows.shape[1] * rows.dtype.itemsize,
    )
    return size


def combine(
    spec: CombineSpec,
    index: RowIndex,
    rows: jax.Array,
    weights: jax.Array | None,
    biases: Sequence[jax.Array],
) -> jax.Array:
    """The custom call: [num_tokens, hidden] from rows [recv_capacity, hidden]."""
    if spec.backend == "cuda" and index.send_row.shape[1] > _limits.MAX_TOPK:
        raise ConfigError(
            f"{spec.op}: backend 'cuda' takes at most {_limits.MAX_TOPK} choices a token, got "
            f"{index.send_row.shape[1]}"
        )
    position = check_mesh(spec.group.position(), spec.group, op=spec.op)
    return _bind(
        position,
        absent(jnp.int32) if index.send_rank is None else index.send_rank,
        index.send_row,
        absent(jnp.float32) if weights is None else weights,
        rows,
        *biases,
        group=spec.group.identity,
        has_weights=weights is not None,
        layout=spec.layout.value,
        num_sms=spec.num_sms,
        op=spec.op,
        workspace_bytes=combine_workspace_bytes(spec, index, rows),
    )[0]
