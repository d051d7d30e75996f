"""vary_alike: gives all operands of a call the same varying axes."""

from typing import Any

import jax
import jax.numpy as jnp

from jax_ep._src.base import jax_compat
from jax_ep._src.group.group import Group
from jax_ep._src.ops.common.without_tangent import without_tangent


def vary_alike(operands: Any, group: Group) -> Any:
    """Casts the arrays of a pytree to vary over the group's axes and every axis of one of them.

    No derivative flows through integers.
    """
    leaves, structure = jax.tree.flatten(jax.tree.map(jnp.asarray, operands))
    leaves = [without_tangent(a) if jnp.issubdtype(a.dtype, jnp.integer) else a for a in leaves]
    return jax.tree.unflatten(structure, jax_compat.vary_alike(leaves, group.axes))
