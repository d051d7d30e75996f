"""The only mutable state of a process: groups open, modules registered, what was told."""

import os
import threading
import weakref
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import jax

from jax_ep._src.base.errors import GroupError

if TYPE_CHECKING:
    from jax_ep._src.group.group import Group

open_groups: "dict[str, Group]" = {}
# All that have not been deleted, closed ones as well.
groups: "weakref.WeakSet[Group]" = weakref.WeakSet()
registered_backends: set[str] = set()
# Arrays whose failure some check() has raised: JAX raises it at every look.
told_failures: "list[weakref.ref[jax.Array]]" = []
# By identity: of two threads that want one group, the second finds what the first has opened.
_opening: dict[str, AbstractContextManager[Any]] = {}
os.register_at_fork(after_in_child=_opening.clear)  # whoever held one is not there
joins_at_exit: int | None = None  # the pid of a process of several, not of its forked children
interrupts_survived: int | None = None  # None: nobody watches them


def opening(identity: str) -> AbstractContextManager[Any]:
    """For one thread at a time. Threads that open different groups do not wait for one another.

    Other processes may open these in another order.
    """
    return _opening.setdefault(identity, threading.RLock())


def find_group(identity: str, *, op: str) -> "Group":
    """The open group of an identity, as a handle carries it."""
    return _find(identity, f"{op}: the handle's group {identity} is not open")


def load_group(identity: str) -> "Group":
    """The open group of an identity, as a pickle carries it."""
    return _find(
        identity,
        f"pickle: group {identity} is not open in this process: open it first, over the same "
        "devices, axes and name",
    )


def _find(identity: str, problem: str) -> "Group":
    group = open_groups.get(identity)
    if group is None:
        known = ", ".join(sorted(open_groups)) or "none"
        raise GroupError(f"{problem}; open groups: {known}")
    return group
