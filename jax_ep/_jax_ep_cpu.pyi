"""Host twins of jax_ep's operations, and the native half of its groups."""

from collections.abc import Sequence

from typing_extensions import CapsuleType


def registrations() -> dict[str, object]:
    """Target name to handler capsules."""

def types() -> dict[str, object]:
    """FFI type name to its capsules."""

def build_info() -> dict[str, object]:
    """Sources, compilers and FFI API version of this build."""

def limits() -> dict[str, int]:
    """Limits of the operations, by name."""

def enums() -> dict[str, dict[str, int]]:
    """Members of the enums that are attributes of custom calls."""

def slot_payload(num_ranks: int) -> int:
    """Bytes that one rank can store in the slots of another in one call."""

def push_payload(num_ranks: int) -> int:
    """Bytes that one rank can push to another in one call."""

def low_latency_payload(num_tokens: int, num_topk: int, row_bytes: Sequence[int]) -> int:
    """
    Bytes that one rank sends to another in a low-latency exchange; num_topk of a combine: 0.
    """

def low_latency_room(num_ranks: int, bytes: int) -> int:
    """
    Bytes that one rank can send to another, in a group with so many low_latency_bytes.
    """

def in_flight_room(num_ranks: int, bytes: int) -> int:
    """
    Bytes that one rank can send to another, in a group with so many in_flight_bytes.
    """

def two_shot_payload(num_ranks: int) -> int:
    """Bytes from each rank that a two-shot can push."""

class Group:
    """Who is who in a group, and the exchange between them."""

    def error(self) -> dict[str, object] | None:
        """The first failure on a device, or None."""

    def has_other_processes(self) -> bool:
        """
        Whether another process of the group is still there, as far as is known.
        """

    def skip_rank(self, rank: int) -> None:
        """For tests: keeps the calls of a rank from its peers; -1 ends it."""

def open_group(identity: str, positions: Sequence[tuple[int, int, int, int]], num_slices: int, num_ranks: int, timeout_ms: int, processes: Sequence[int] = [], own_process: int = 0, links: Sequence[tuple[int, int, int]] = []) -> Group:
    """
    Opens a group. Positions are (device id, slice, rank, position in the mesh), of whole slices,
    and processes whose they are. Links are (process, pid, descriptor of a stream socket),
    which the group takes over.
    """

def has_closed_group(identity: str) -> bool:
    """Whether executables hold a group of this identity that was closed."""

def begin_program() -> None:
    """
    When a program is lowered: what is loaded next belongs to another executable than before.
    """

def allow_readers() -> None:
    """Lets other processes of the user read the memory of this one."""

def exit_without_teardown() -> None:
    """
    From now on the process ends with the interpreter, and runs no destructors.
    """

def watch_interrupts() -> None:
    """
    From now on an interrupt (SIGINT) ends calls that wait for peers, if the signal has a
    handler: once more after that handler was replaced.
    """

def num_interrupts() -> int:
    """Interrupts so far, since they are watched."""

def leave_by_interrupt() -> None:
    """
    From now on the process ends: calls that wait are ended as by interrupts.
    """

def any_waits() -> bool:
    """Whether a call of a group waits in this process."""

def interrupts() -> CapsuleType:
    """What the groups of other modules join."""

def try_reading(pid: int, address: int, expected: int) -> str | None:
    """
    Why 8 bytes of another process cannot be read, or None if they are as expected.
    """

def close_group(identity: str) -> None:
    """Forgets a group; executables that hold it keep it alive."""
