"""Host twins of jax_ep's operations, and the native half of its groups."""

from collections.abc import Sequence


def registrations() -> dict[str, object]:
    """Target name to handler capsules."""

def types() -> dict[str, object]:
    """FFI type name to its capsules."""

def build_info() -> dict[str, object]:
    """Compiler and FFI API version of this build."""

class Group:
    """Who is who in a group, and the exchange between them."""

    def error(self) -> dict[str, object] | None:
        """The first failure on a device, or None."""

    def skip_rank(self, rank: int) -> None:
        """For tests: keeps the calls of a rank from its peers; -1 ends it."""

def open_group(identity: str, seats: Sequence[tuple[int, int, int]], num_slices: int, num_ranks: int, timeout_ms: int) -> Group:
    """
    Opens a group. Seats are (device id, slice, rank) in the row-major order of the mesh.
    """

def close_group(identity: str) -> None:
    """Forgets a group; executables that hold it keep it alive."""
