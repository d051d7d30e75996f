"""The only mutable state of a process: groups open, groups ever opened, modules registered."""

from collections import Counter
from typing import TYPE_CHECKING

from jax_ep.errors import GroupError

if TYPE_CHECKING:
    from jax_ep.group import Group

open_groups: "dict[str, Group]" = {}
registered_backends: set[str] = set()
openings: Counter[str] = Counter()


def count_opening(identity: str) -> int:
    """How many times a group of this identity was opened before; equal in every process.

    An opening that others did not come to is taken back (_bootstrap.Meeting.abandon).
    """
    openings[identity] += 1
    return openings[identity] - 1


def find_group(identity: str, *, op: str) -> "Group":
    """The open group of an identity, as a handle carries it."""
    try:
        return open_groups[identity]
    except KeyError:
        known = ", ".join(sorted(open_groups)) or "none"
        raise GroupError(
            f"{op}: the handle's group {identity} is not open; open groups: {known}"
        ) from None
