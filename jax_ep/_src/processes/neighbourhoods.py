"""Which processes of a mesh have to reach one another."""

from collections.abc import Sequence


def neighbourhoods(owners: Sequence[int], slices: Sequence[int]) -> list[list[int]]:
    """The processes whose slices hang together, for each such set; the same in every process.

    Ranks exchange inside a slice only, so processes meet that share one, and those that share
    another one with either of them. A mesh of many hosts falls into neighbourhoods of one host
    each where no slice leaves its host.

    Args:
      owners: the process of each position of the mesh.
      slices: the slice of each.
    """
    of_slice: dict[int, set[int]] = {}
    for owner, slice_ in zip(owners, slices, strict=True):
        of_slice.setdefault(slice_, set()).add(owner)
    found: dict[int, set[int]] = {}  # by process
    for processes in of_slice.values():
        joined = processes.union(*(found.get(process, ()) for process in processes))
        found |= dict.fromkeys(joined, joined)
    return sorted({min(joined): sorted(joined) for joined in found.values()}.values())
