"""pull_rows from XLA's collectives: gathers all ranks' rows, and takes the wanted rows."""

import jax
import jax.numpy as jnp

from jax_ep._src.base.spec import CallSpec, DispatchSpec
from jax_ep._src.ops.common.check_mesh import check_mesh
from jax_ep._src.ops.common.tokens import gather_tokens, take


def pull_rows(spec: CallSpec | DispatchSpec, index: jax.Array, rows: jax.Array) -> jax.Array:
    """Returns [N, ...], the rows of the peers' arrays that `index` names, like the custom call."""
    rows = check_mesh(rows, spec.group, op=spec.op)
    # Rows move as integers: XLA:CPU selects fp8 through a wider type, which changes NaN bits.
    is_float = jnp.issubdtype(rows.dtype, jnp.floating)
    carrier = jnp.dtype(f"uint{8 * rows.dtype.itemsize}") if is_float else rows.dtype
    bits = jax.lax.bitcast_convert_type(rows, carrier) if is_float else rows
    taken = take(gather_tokens(spec.group, bits), index)
    return jax.lax.bitcast_convert_type(taken, rows.dtype) if is_float else taken
