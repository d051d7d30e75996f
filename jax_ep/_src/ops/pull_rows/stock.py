"""pull_rows from stock collectives: all ranks' rows are gathered, and the wanted ones taken."""

import jax
import jax.numpy as jnp

from jax_ep._src.base.spec import CallSpec, DispatchSpec
from jax_ep._src.ops.common.check_mesh import check_mesh
from jax_ep._src.ops.common.tokens import gather_tokens, take


def pull_rows(spec: CallSpec | DispatchSpec, index: jax.Array, rows: jax.Array) -> jax.Array:
    """[N, ...], the rows of the peers' arrays that `index` names; the custom call's contract."""
    rows = check_mesh(rows, spec.group, op=spec.op)
    # As integers: XLA:CPU selects fp8 through a wider type, which changes the bits of a NaN.
    is_float = jnp.issubdtype(rows.dtype, jnp.floating)
    carrier = jnp.dtype(f"uint{8 * rows.dtype.itemsize}") if is_float else rows.dtype
    bits = jax.lax.bitcast_convert_type(rows, carrier) if is_float else rows
    taken = take(gather_tokens(spec.group, bits), index)
    return jax.lax.bitcast_convert_type(taken, rows.dtype) if is_float else taken
