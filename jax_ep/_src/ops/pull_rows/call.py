"""The custom call of pull_rows; xla_ffi/ops/pull_rows/pull_rows_ffi.h declares its handler."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jax_ep._src.base.spec import CallSpec, ExchangeSpec, RowIndex
from jax_ep._src.ops.common.check_mesh import check_mesh
from jax_ep._src.ops.common.primitive import Result, absent, make_primitive
from jax_ep._src.ops.pull_rows import stock


class _Results(NamedTuple):
    """Arrays, or their shape and dtype, in the order of the handler."""

    pulled: Any
    places: Any


def _results(
    position: Any, index: Any, slot: Any, rows: Any, *, num_ranks: int, num_slots: int, **_: Any
) -> _Results:
    num_sources = num_ranks * rows.shape[0] if num_slots > 0 else 0
    return _Results(
        pulled=Result((index.shape[0], *rows.shape[1:]), rows.dtype),
        places=Result((num_sources, num_slots), jnp.int32),
    )


_bind = make_primitive(
    "pull_rows", _results, platforms=("cpu", "cuda"), attributes=("group", "num_sms")
)


def pull_rows(
    spec: CallSpec,
    index: jax.Array,
    rows: jax.Array,
    *,
    slot: jax.Array | None = None,
    num_slots: int = 0,
) -> jax.Array:
    """Reads rows of the peers' arrays.

    Args:
      spec: the ranks, and the SMs that they use.
      index: [N] int32, rank * M + row; -1 gives zeros.
      rows: [M, ...], this rank's part.
      slot: [N] int32, or None. Indices of the same source row have different slots in
        [0, num_slots), so the source row crosses the link only once.
      num_slots: number of slots.

    Returns:
      [N, ...]. XLA's collectives move the rows if the custom call has no room to stage them.
    """
    if spec.backend == "xla" or not spec.group.can_stage(rows):
        return stock.pull_rows(spec, index, rows)
    position = check_mesh(spec.group.position(), spec.group, op=spec.op)
    fans_out = slot is not None and spec.backend == "cuda"
    results: _Results = _bind(
        position,
        index,
        slot if slot is not None else absent(jnp.int32),
        rows,
        group=spec.group.identity,
        num_ranks=spec.group.num_ranks,
        num_slots=num_slots if fans_out else 0,
        num_sms=spec.num_sms,
        op=spec.op,
    )
    pulled: jax.Array = results.pulled
    return pulled


def pull_along(spec: ExchangeSpec, index: RowIndex, rows: jax.Array) -> jax.Array:
    """Sends each token's row along the routing of a dispatch: [recv_capacity, ...]."""
    num_topk = index.send_row.shape[1]
    return pull_rows(spec.to_pull(), index.recv_src, rows, slot=index.recv_k, num_slots=num_topk)
