"""pull_rows with its gradient, which is pull_rows along the inverse index."""

from functools import partial

import jax

from jax_ep._src.base.spec import RouteSpec
from jax_ep._src.ops.pull_rows import call


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def pull_rows(spec: RouteSpec, rows: jax.Array, index: jax.Array, inverse: jax.Array) -> jax.Array:
    """Pulls rows of the peers' arrays by index; `inverse` is the index for the way back."""
    return call.pull_rows(spec.to_pull(), index, rows)


def _fwd(
    spec: RouteSpec, rows: jax.Array, index: jax.Array, inverse: jax.Array
) -> tuple[jax.Array, jax.Array]:
    return pull_rows.fun(spec, rows, index, inverse), inverse


def _bwd(spec: RouteSpec, inverse: jax.Array, ct: jax.Array) -> tuple[jax.Array, None, None]:
    return call.pull_rows(spec.of_gradient().to_pull(), inverse, ct), None, None


pull_rows.defvjp(_fwd, _bwd)
