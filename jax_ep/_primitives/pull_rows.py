"""The primitive of pull_rows; xla_ffi/ops/pull_rows/pull_rows_ffi.h is its other side."""

from typing import Any

import jax
import jax.numpy as jnp

from jax_ep._primitives._base import absent, make_primitive
from jax_ep._primitives.check_mesh import check_mesh
from jax_ep._spec import CallSpec


def _results(
    position: Any, index: Any, slot: Any, rows: Any, *, num_ranks: int, num_slots: int, **_: Any
) -> list[tuple[tuple[int, ...], Any]]:
    num_sources = num_ranks * rows.shape[0] if num_slots > 0 else 0
    return [
        ((index.shape[0], *rows.shape[1:]), rows.dtype),
        ((num_sources, num_slots), jnp.int32),  # places
    ]


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
      spec: the ranks, and the SMs they use.
      index: [N] int32, rank * M + row; -1 gives zeros.
      rows: [M, ...], this rank's part.
      slot: [N] int32, or None. Rows that name the same source have different slots in
        [0, num_slots), so that the source needs to cross the link only once.
      num_slots: see slot.

    Returns:
      [N, ...]
    """
    position = check_mesh(spec.group.position(), spec.group, op=spec.op)
    fans_out = slot is not None and spec.backend == "cuda"
    return _bind(
        position,
        index,
        slot if slot is not None else absent(jnp.int32),
        rows,
        group=spec.group.identity,
        num_ranks=spec.group.num_ranks,
        num_slots=num_slots if fans_out else 0,
        num_sms=spec.num_sms,
        op=spec.op,
    )[0]
