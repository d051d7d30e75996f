"""
CUDA twins of jax_ep's operations, and the native half of groups on GPUs.
"""

from collections.abc import Sequence


def registrations() -> dict[str, object]:
    """Target name to handler capsules."""

def types() -> dict[str, object]:
    """FFI type name to its capsules."""

def build_info() -> dict[str, object]:
    """Compiler and FFI API version of this build."""

class Group:
    """Who is who in a group, and where they meet."""

    def error(self) -> dict[str, object] | None:
        """The first failure on a device, or None."""

    def skip_rank(self, rank: int) -> None:
        """For tests: keeps the calls of a rank from its peers; -1 ends it."""

def open_group(identity: str, seats: Sequence[tuple[int, int, int]], num_slices: int, num_ranks: int, timeout_ms: int) -> Group:
    """
    Opens a group. Seats are (CUDA device, slice, rank) in the row-major order of the mesh.
    """

def check_devices(devices: Sequence[int]) -> None:
    """
    Raises RuntimeError, saying why, unless the CUDA devices can form a group.
    """

def close_group(identity: str) -> None:
    """Forgets a group; executables that hold it keep it alive."""

def dispatch_workspace_bytes(layout: int, num_experts: int, num_ranks: int, num_tokens: int, num_topk: int) -> int:
    """Scratch of one dispatch; 0 where it cannot be planned."""

def combine_workspace_bytes(layout: int, num_ranks: int, num_tokens: int, num_slots: int, row_bytes: int) -> int:
    """Scratch of one combine: the rings of partial sums."""
