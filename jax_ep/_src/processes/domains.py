"""Nodes of a group as the machines have them: ranks that are in one domain.

A domain is what ranks need to have in common to reach one another's memory. It has a name, and
only names are compared.
"""

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple


class Nodes(NamedTuple):
    """The nodes of a group.

    Attributes:
      ranks_per_node: ranks of each node, consecutive.
      origin: where that number comes from, in words.
    """

    ranks_per_node: int
    origin: str


def domain_of(host: str) -> str:
    """Returns the name of this process's domain, or "" if it is not known.

    `host`: the name of its host, or "". Today a domain is a host. GPUs of several hosts that one
    NVLink fabric joins would have the name of their fabric here.
    """
    return host


def find_nodes(domains: Sequence[Sequence[str]]) -> Nodes:
    """Returns the nodes of a group. Each domain is one if they are equal, else all ranks are one.

    Domains are equal if each has consecutive ranks of a slice, two or more, and equally many in all
    slices.

    Args:
      domains: for each slice the domain of each rank; "" if it is not known.
    """
    num_ranks = len(domains[0])
    sizes = set()
    for slice_, names in enumerate(domains):
        if "" in names:
            return Nodes(num_ranks, f"the host of rank {names.index('')} is not known")
        first = 0
        seen: dict[str, int] = {}  # the last rank of each domain
        for name, run in groupby(names):
            size = sum(1 for _ in run)
            if name in seen:
                return Nodes(
                    num_ranks,
                    f"the ranks of a host are not consecutive: ranks {seen[name]} and {first} of "
                    f"slice {slice_} share a host, rank {first - 1} is on another one",
                )
            sizes.add(size)
            first += size
            seen[name] = first - 1
    if sizes == {num_ranks}:
        return Nodes(num_ranks, "each slice is on one host")
    if sizes == {1}:
        return Nodes(num_ranks, "each host has one rank of a slice, so no host adds anything up")
    if len(sizes) > 1:
        listed = " and ".join(map(str, sorted(sizes)))
        return Nodes(num_ranks, f"hosts have different numbers of ranks of a slice: {listed}")
    return Nodes(sizes.pop(), "the ranks of each host")
