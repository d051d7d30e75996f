"""The only mutable state of a process: groups open, modules registered, what was told."""

import weakref
from typing import TYPE_CHECKING

import jax

from jax_ep.errors import GroupError

if TYPE_CHECKING:
    from jax_ep.group import Group

open_groups: "dict[str, Group]" = {}
registered_backends: set[str] = set()
# Arrays whose failure some check() has raised: JAX raises it at every look.
told_failures: "list[weakref.ref[jax.Array]]" = []
interrupts_survived: int | None = None  # None: nobody watches them


def find_group(identity: str, *, op: str) -> "Group":
    """The open group of an identity, as a handle carries it."""
    try:
        return open_groups[identity]
    except KeyError:
        known = ", ".join(sorted(open_groups)) or "none"
        raise GroupError(
            f"{op}: the handle's group {identity} is not open; open groups: {known}"
        ) from None
