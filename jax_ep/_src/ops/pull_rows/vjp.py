"""Moves of single numbers by pull_rows, each the gradient of the other, by the inverse index."""

from functools import partial

import jax

from jax_ep._src.base.spec import RouteSpec
from jax_ep._src.ops.two_levels import pull


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def pull_to_rows(
    spec: RouteSpec, numbers: jax.Array, index: jax.Array, inverse: jax.Array
) -> jax.Array:
    """Pulls numbers at the tokens to the rows; `inverse` is the index for the way back."""
    return pull.pull_to_rows(spec, index, numbers)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def pull_to_tokens(
    spec: RouteSpec, numbers: jax.Array, index: jax.Array, inverse: jax.Array
) -> jax.Array:
    """Pulls numbers at the rows to the tokens; `inverse` is the index for the way back."""
    return pull.pull_to_tokens(spec, index, numbers)


def _to_rows_fwd(spec: RouteSpec, *operands: jax.Array) -> tuple[jax.Array, jax.Array]:
    return pull_to_rows.fun(spec, *operands), operands[2]


def _to_rows_bwd(
    spec: RouteSpec, inverse: jax.Array, ct: jax.Array
) -> tuple[jax.Array, None, None]:
    return pull.pull_to_tokens(spec.of_gradient(), inverse, ct), None, None


def _to_tokens_fwd(spec: RouteSpec, *operands: jax.Array) -> tuple[jax.Array, jax.Array]:
    return pull_to_tokens.fun(spec, *operands), operands[2]


def _to_tokens_bwd(
    spec: RouteSpec, inverse: jax.Array, ct: jax.Array
) -> tuple[jax.Array, None, None]:
    return pull.pull_to_rows(spec.of_gradient(), inverse, ct), None, None


pull_to_rows.defvjp(_to_rows_fwd, _to_rows_bwd)
pull_to_tokens.defvjp(_to_tokens_fwd, _to_tokens_bwd)
