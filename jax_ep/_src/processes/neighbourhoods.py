"""Sets of processes of a mesh that have to reach one another."""

from collections.abc import Sequence


def neighbourhoods(owners: Sequence[int], slices: Sequence[int]) -> list[list[int]]:
    """Returns sets of processes that slices connect; the result is equal in every process.

    Ranks exchange data only inside a slice. So two processes are neighbours if they share a slice,
    or if a chain of shared slices connects them. If no slice leaves its host, a mesh of many hosts
    has separate neighbourhoods on each host.

    Args:
      owners: the process of each position of the mesh.
      slices: the slice of each position of the mesh.
    """
    of_slice: dict[int, set[int]] = {}
    for owner, slice_ in zip(owners, slices, strict=True):
        of_slice.setdefault(slice_, set()).add(owner)
    found: dict[int, set[int]] = {}  # by process
    for processes in of_slice.values():
        joined = processes.union(*(found.get(process, ()) for process in processes))
        found |= dict.fromkeys(joined, joined)
    return sorted({min(joined): sorted(joined) for joined in found.values()}.values())
