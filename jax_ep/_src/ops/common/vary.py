"""vary_alike: one type of varying axes for all operands of a call."""

from typing import Any

import jax
import jax.numpy as jnp

from jax_ep._src.base import jax_compat
from jax_ep._src.group.group import Group
from jax_ep._src.ops.common.without_tangent import without_tangent


def vary_alike(operands: Any, group: Group) -> Any:
    """The arrays of a pytree, cast to vary over the group and over what any of them varies over.

    No derivative flows through integers.
    """
    leaves, structure = jax.tree.flatten(jax.tree.map(jnp.asarray, operands))
    leaves = [without_tangent(a) if jnp.issubdtype(a.dtype, jnp.integer) else a for a in leaves]
    return jax.tree.unflatten(structure, jax_compat.vary_alike(leaves, group.axes))
