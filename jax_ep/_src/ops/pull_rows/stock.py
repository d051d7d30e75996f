"""pull_rows from XLA's collectives: gathers all ranks' rows, and takes the wanted rows."""

import jax

from jax_ep._src.base.spec import CallSpec, DispatchSpec
from jax_ep._src.ops.common.check_mesh import check_mesh
from jax_ep._src.ops.common.tokens import from_bits, gather_tokens, take, to_bits


def pull_rows(spec: CallSpec | DispatchSpec, index: jax.Array, rows: jax.Array) -> jax.Array:
    """Returns [N, ...], the rows of the peers' arrays that `index` names, like the custom call."""
    bits = to_bits(check_mesh(rows, spec.group, op=spec.op))
    return from_bits(take(gather_tokens(spec.group, bits), index), rows.dtype)
