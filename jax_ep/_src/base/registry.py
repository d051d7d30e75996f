"""The only mutable state of a process: open groups, registered modules, failures told."""

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
# Groups that have not been deleted, closed groups included.
groups: "weakref.WeakSet[Group]" = weakref.WeakSet()
registered_backends: set[str] = set()
# Arrays whose failure some check() has raised. JAX raises the failure again at every look.
told_failures: "list[weakref.ref[jax.Array]]" = []
# Locks by identity. If two threads open one group, the second finds what the first has opened.
_opening: dict[str, AbstractContextManager[Any]] = {}
os.register_at_fork(after_in_child=_opening.clear)  # a thread that held a lock is not there
joins_at_exit: int | None = None  # pid of a process of several; a forked child has another pid
interrupts_survived: int | None = None  # None: nobody watches interrupts
# Groups whose ragged_all_to_all stands for JAX's, and JAX's meanwhile (jax_ep.compat).
ragged_groups: "list[Group]" = []
replaced_ragged: Any = None
replacing_ragged = threading.Lock()


def opening(identity: str) -> AbstractContextManager[Any]:
    """Returns the lock that one thread at a time holds while it opens a group.

    Threads that open different groups do not wait for one another: other processes may open the
    groups in another order.
    """
    return _opening.setdefault(identity, threading.RLock())


def find_group(identity: str, *, op: str) -> "Group":
    """Returns the open group for the identity that a handle carries."""
    return _find(identity, f"{op}: the handle's group {identity} is not open")


def load_group(identity: str) -> "Group":
    """Returns the open group for the identity that a pickle carries."""
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
