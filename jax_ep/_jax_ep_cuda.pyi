"""
CUDA twins of jax_ep's operations, and the native half of groups on GPUs.
"""

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
    """Who is who in a group, and where they meet."""

    def error(self) -> dict[str, object] | None:
        """The first failure on a device, or None."""

    def find_pool(self, index: int, address: int) -> bool:
        """
        Whether peers of this process can read the memory at an address of a position.
        """

    @property
    def has_native_atomics(self) -> bool:
        """Whether 16 bytes arrive at once at all peers, which packets rely on."""

    @property
    def stages_all(self) -> bool:
        """Whether all operands are copied."""

    @property
    def staging_bytes(self) -> int:
        """Room for copies of operands."""

    @property
    def low_latency_bytes(self) -> int:
        """Room for packets of low-latency exchanges."""

    @property
    def in_flight_bytes(self) -> int:
        """
        Room for packets of flights: exchanges that are sent and received apart.
        """

    def export_position(self, index: int, address: int) -> tuple[list[int], int, int]:
        """
        What another process needs to reach a device of this one: numbers, and descriptors of
        its signals and of the pool that an address of it lies in; -1 where all is staged.
        """

    def import_position(self, index: int, numbers: Sequence[int], control: int, pool: int) -> None:
        """The same of a device elsewhere; takes the descriptors over."""

    def complete(self) -> None:
        """After all imports: the group may be used."""

    def abandon(self) -> None:
        """
        After another process was lost: what runs on the devices may never end, so the group's
        end will not wait for it, nor free what it uses.
        """

    def join_interrupts(self, interrupts: CapsuleType) -> None:
        """
        From now on calls that wait end when the process is interrupted, as the capsule of the
        CPU module tells.
        """

    def set_survives(self, survives: bool) -> None:
        """
        Whether the group goes on without other processes: an interrupt of this one then ends
        its own ranks' calls only.
        """

    def left_out(self) -> list[int]:
        """Ranks that a device here leaves out of calls with a mask."""

    def set_epoch(self, epoch: int) -> None:
        """
        For tests: as if so many calls had been made; all processes, between two calls.
        """

    def skip_rank(self, rank: int) -> None:
        """For tests: keeps the calls of a rank from its peers; -1 ends it."""

def open_group(identity: str, positions: Sequence[tuple[int, int, int, int]], num_slices: int, num_ranks: int, timeout_ms: int, is_here: Sequence[bool] = [], staging_bytes: int = 0, stages_all: bool = False, low_latency_bytes: int = 0, in_flight_bytes: int = 0) -> Group:
    """
    Opens a group. Positions are (CUDA device, slice, rank, position in the mesh), of whole slices.
    is_here says which of them are this process's; empty: all. staging_bytes of each device
    hold copies of operands that peers have not mapped, of all operands where stages_all.
    low_latency_bytes hold packets of low-latency exchanges, in_flight_bytes those of flights.
    """

def find_closed_group(identity: str) -> Group:
    """
    The group of an identity that was closed and that executables hold, or None.
    """

def reopen_group(group: Group, timeout_ms: int) -> Group:
    """
    Opens a closed group again in its memory, which captured programs refer to; when nothing
    of it runs in any process.
    """

def device_of(address: int) -> int:
    """The CUDA device that an address lies on."""

def check_devices(devices: Sequence[int]) -> None:
    """
    Raises RuntimeError, saying why, unless the CUDA devices can form a group.
    """

def close_group(identity: str) -> None:
    """Forgets a group; executables that hold it keep it alive."""

def dispatch_workspace_bytes(layout: int, num_experts: int, num_ranks: int, num_tokens: int, num_topk: int, num_parts: int = 1) -> int:
    """
    Scratch of one dispatch; 0 where it cannot be planned. num_tokens are those of a source.
    """

def low_latency_table_bytes(layout: int, num_experts: int, num_ranks: int, num_tokens: int, num_topk: int) -> int:
    """Shared memory of a low-latency dispatch; it has a limit."""

def combine_workspace_bytes(layout: int, num_ranks: int, num_tokens: int, num_slots: int, row_bytes: int) -> int:
    """Scratch of one combine: the rings of partial sums."""
