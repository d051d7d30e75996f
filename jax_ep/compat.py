"""Our operations under JAX's names, for programs that are not to be edited."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax

from jax_ep._src.base import registry
from jax_ep._src.base.errors import GroupError
from jax_ep._src.group.group import Group
from jax_ep._src.ops.ragged_all_to_all.api import ragged_all_to_all

__all__ = ["use_ragged_all_to_all"]


@contextmanager
def use_ragged_all_to_all(group: Group) -> Iterator[None]:
    """Makes `jax.lax.ragged_all_to_all` along a group's axes `jax_ep.ragged_all_to_all`.

    For a `with` block, or as a decorator. Calls along other axes stay JAX's. What counts is when a
    call is traced: a function that JAX compiles in the block keeps our call afterwards, and one
    that it has compiled before keeps JAX's in the block. The name in `jax.lax` is replaced: code
    that has imported the function itself does not see ours, and code that other threads trace
    meanwhile does. Blocks may be nested, with the same group or others; the innermost one along the
    axes counts.

    Args:
      group: the ranks along the axes that the program names.

    Returns:
      A context manager.

    Collective: no, but every process of the group traces its calls alike.
    Raises: GroupError if `group` is no group; in the block, what `jax_ep.ragged_all_to_all` raises.
    """
    if not isinstance(group, Group):
        raise GroupError(
            f"use_ragged_all_to_all: group must be a jax_ep.Group, got {type(group).__name__}"
        )
    with registry.replacing_ragged:
        if not registry.ragged_groups:
            registry.replaced_ragged = jax.lax.ragged_all_to_all
            jax.lax.ragged_all_to_all = _along_groups
        registry.ragged_groups.append(group)
    try:
        yield
    finally:
        with registry.replacing_ragged:
            # Blocks of other threads may end in another order.
            last = len(registry.ragged_groups) - 1 - registry.ragged_groups[::-1].index(group)
            del registry.ragged_groups[last]
            if not registry.ragged_groups:
                jax.lax.ragged_all_to_all = registry.replaced_ragged
                registry.replaced_ragged = None


def _along_groups(*operands: Any, axis_name: Any, **options: Any) -> jax.Array:
    """Stands for jax.lax.ragged_all_to_all while a block is open."""
    axes = tuple(axis_name) if isinstance(axis_name, tuple | list) else (axis_name,)
    stock = registry.replaced_ragged
    for group in reversed(list(registry.ragged_groups)):
        if group.axes == axes:
            return ragged_all_to_all(*operands, axis_name=group, **options)
    found: jax.Array = stock(*operands, axis_name=axis_name, **options)
    return found
