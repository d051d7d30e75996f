"""The exceptions that jax_ep raises.

Messages name the operation, the argument, the expected value and the value that came.
"""

from typing import Any


class JaxEpError(Exception):
    """Base of all exceptions of this package. They can be pickled and copied."""

    def __reduce__(self) -> tuple[Any, ...]:
        # Exception.__reduce__ calls the class with the message, which may not be its argument.
        return _restore, (type(self), self.args), self.__dict__


class ShapeError(JaxEpError, ValueError):
    """An array has the wrong shape, or shapes do not fit together."""


class DTypeError(JaxEpError, TypeError):
    """An array has an element type that the operation does not take."""


class ConfigError(JaxEpError, ValueError):
    """A setting is out of range, or contradicts another one."""


class GroupError(JaxEpError, RuntimeError):
    """A group is closed, unknown, over another mesh, or cannot be opened."""


class GroupInterruptedError(GroupError):
    """The user has interrupted a process (SIGINT, Ctrl-C) while calls of the group waited there.

    The process itself gets KeyboardInterrupt. The group is unusable from then on, in all processes.
    """


class RoutingError(JaxEpError, ValueError):
    """Debug mode: the routing holds ids that are no experts, or one expert twice in a token."""


class PeerTimeoutError(JaxEpError, RuntimeError):
    """A peer did not arrive within the group's timeout, or its process has ended.

    The group is unusable from then on.

    Attributes:
      op: the public operation that waited; in its backward pass "dispatch (gradient)" and the like.
      rank: the rank that waited.
      peer: the rank that did not come.
      expected: number of ranks that the call needs.
      seen: number of ranks that had come when the time was up.
      is_lost: whether the process of the peer is known to have ended.
      place: where the peer is instead, if that is known, else "".
    """

    def __init__(
        self,
        op: str,
        rank: int,
        peer: int,
        expected: int,
        seen: int,
        *,
        is_lost: bool = False,
        place: str = "",
    ):
        how = "whose process has ended" if is_lost else "until the timeout"
        super().__init__(
            f"{op}: rank {rank} waited for rank {peer}{',' if is_lost else ''} {how}: "
            f"expected {expected} ranks, got {seen}" + (f"; rank {peer} {place}" if place else "")
        )
        self.op = op
        self.rank = rank
        self.peer = peer
        self.expected = expected
        self.seen = seen
        self.is_lost = is_lost
        self.place = place

    def to_plain(self) -> dict[str, Any]:
        """Returns the arguments that make the same exception elsewhere, in JSON's types."""
        names = ("op", "rank", "peer", "expected", "seen", "is_lost", "place")
        return {name: getattr(self, name) for name in names}


class ProgramError(JaxEpError, RuntimeError):
    """A program failed in JAX, not in the group: a callback raised, a device ran out of memory.

    `__cause__` is the exception that JAX raised. The group stays usable.
    """


class LaunchError(JaxEpError, RuntimeError):
    """A program of several processes failed, or did not end in time."""


def _restore(kind: type[JaxEpError], args: tuple[Any, ...]) -> JaxEpError:
    return kind.__new__(kind, *args)


def error_of(record: dict[str, Any]) -> JaxEpError:
    """Returns the exception for the record that a native group keeps of its first failure.

    The keys of the record are `kind`, the attributes of PeerTimeoutError, and `slice`.
    """
    record = {"place": "", **record}
    record.pop("slice", None)
    kind = record.pop("kind")
    op, rank, peer = record["op"], record["rank"], record["peer"]
    if kind in ("peer_timeout", "peer_lost"):
        return PeerTimeoutError(**record, is_lost=kind == "peer_lost")
    if kind == "interrupted":
        expected, seen = record["expected"], record["seen"]
        waited = f"rank {peer}: expected {expected} ranks, got {seen}" if peer >= 0 else "its peers"
        return GroupInterruptedError(
            f"{op}: the process of rank {rank} was interrupted while it waited for {waited}"
        )
    messages = {
        "mesh_mismatch": (
            "the program ran over another mesh or device order than the group: the device of mesh "
            f"position {record['seen']} is at {record['expected']} in the group's mesh (-1: not in "
            "it)"
        ),
        "call_mismatch": (
            f"rank {rank} met rank {peer} at another call: the ranks of a group must make the same "
            "calls in the same order"
        ),
        "not_mapped": (
            f"peers cannot read an operand of rank {peer} where it lies, and it is larger than the "
            "room for copies (JAX_EP_STAGING_MB): the operand is a constant of the program, or "
            "memory of another library or allocator"
        ),
        "too_many_in_flight": (
            f"rank {rank} sent exchange number {record['seen']} while {record['expected']} were in "
            "flight, which is the most: receive one before, and let the send wait for it (after=)"
        ),
        "not_in_flight": (
            f"rank {rank} received exchange {record['seen']}, which is not in flight: each send "
            "has one receive, while the group is open"
        ),
    }
    twice = f"rank {rank} arrived twice at one call: {record}"
    return GroupError(f"{op}: {messages.get(kind, twice)}")


def program_error(op: str, cause: Exception) -> ProgramError:
    """Returns a ProgramError for an exception of JAX; the caller raises it from `cause`."""
    # If a callback raised, JAX's message ends in the callback's exception, after a traceback.
    lines = str(cause).split("\n")
    last = next((line for line in reversed(lines) if line.strip()), type(cause).__name__)
    return ProgramError(f"{op}: a program failed in JAX, not in the group: {last}")
