"""The primitive of pull_rows; xla_ffi/ops/pull_rows/pull_rows_ffi.h is its other side."""

from typing import Any

import jax

from jax_ep._primitives._base import make_primitive
from jax_ep._primitives.check_mesh import check_mesh
from jax_ep._spec import CallSpec


def _results(position: Any, index: Any, rows: Any, **_: Any) -> list[tuple[tuple[int, ...], Any]]:
    return [((index.shape[0], *rows.shape[1:]), rows.dtype)]


_bind = make_primitive(
    "pull_rows", _results, platforms=("cpu", "cuda"), attributes=("group", "num_sms")
)


def pull_rows(spec: CallSpec, index: jax.Array, rows: jax.Array) -> jax.Array:
    """Reads rows of the peers' arrays.

    Args:
      spec: the ranks, and the SMs they use.
      index: [N] int32, rank * M + row; -1 gives zeros.
      rows: [M, ...], this rank's part.

    Returns:
      [N, ...]
    """
    position = check_mesh(spec.group.position(), spec.group, op="pull_rows")
    return _bind(position, index, rows, group=spec.group.identity, num_sms=spec.num_sms)[0]
