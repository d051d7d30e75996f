"""Static facts of a group: its ranks on the mesh, and the parts of a group with several nodes."""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jax_ep._src.base import limits


class MeshPosition(NamedTuple):
    """One device of a group's mesh.

    Attributes:
      device: id of the device; CUDA's number of the device for a native group of GPUs.
      slice: index along the mesh axes that are not the group's, and of the part if the group is
        cut into parts.
      rank: rank in the slice.
      place: index in the row-major order of the mesh.
    """

    device: int
    slice: int
    rank: int
    place: int


class Cut(NamedTuple):
    """One way to cut a group into parts that exchange data among themselves.

    Attributes:
      ranks_per_node: ranks of a node.
      is_rail: whether a part is a rail, which has one rank of each node: those with the same index
        in their nodes. Else a part is a node.
    """

    ranks_per_node: int
    is_rail: bool

    def part_and_rank(self, rank: int) -> tuple[int, int]:
        """Returns the part of a rank of the group, and its rank in the part."""
        node, local = divmod(rank, self.ranks_per_node)
        return (local, node) if self.is_rail else (node, local)

    def whole_rank(self, part: int, rank: int) -> int:
        """Returns the rank in the group of a rank of a part."""
        node, local = (rank, part) if self.is_rail else (part, rank)
        return node * self.ranks_per_node + local

    def num_parts(self, num_ranks: int) -> int:
        """Returns the number of parts of a group of `num_ranks`."""
        return self.ranks_per_node if self.is_rail else num_ranks // self.ranks_per_node


@dataclass(frozen=True)
class GroupSpec:
    """The facts of a group that compiled code knows.

    Attributes:
      identity: name and fingerprint; a loaded executable finds its group by them.
      axes: mesh axes along which the ranks run.
      mesh_axes: name and size of every axis of the mesh.
      device_ids: device ids in the row-major order of the mesh.
      staging_bytes: room for the operands of one call if operands are staged; None: they are not.
      has_packets: whether 16 bytes arrive at a peer at once; algorithm low_latency needs that.
      low_latency_room: bytes that one rank can send to another in a low-latency exchange on GPUs.
      in_flight_room: the same where the exchange is sent and received apart.
      cut: the cut whose parts are the slices of this group; None: nothing is cut.
      levels: the parts that carry dispatch and combine if the group has several nodes, else None.
    """

    identity: str
    axes: tuple[str, ...]
    mesh_axes: tuple[tuple[str, int], ...]
    device_ids: tuple[int, ...]
    staging_bytes: int | None = None
    has_packets: bool = True
    low_latency_room: int = 0
    in_flight_room: int = 0
    cut: Cut | None = None
    levels: "Levels | None" = None

    @property
    def _num_along_axes(self) -> int:
        sizes = dict(self.mesh_axes)
        return math.prod(sizes[a] for a in self.axes)

    @property
    def num_ranks(self) -> int:
        """Number of ranks in one slice."""
        num_ranks = self._num_along_axes
        return num_ranks if self.cut is None else num_ranks // self.cut.num_parts(num_ranks)

    @property
    def num_nodes(self) -> int:
        """Number of nodes between which dispatch and combine save traffic."""
        return 1 if self.levels is None else self.levels.rail.num_ranks

    def positions(self) -> list[MeshPosition]:
        """Returns the positions in the row-major order of the mesh."""
        sizes = dict(self.mesh_axes)
        others = tuple(name for name in sizes if name not in self.axes)
        positions = []
        for place, device_id in enumerate(self.device_ids):
            index, rest = {}, place
            for name in reversed(sizes):
                rest, index[name] = divmod(rest, sizes[name])
            slice_, rank = (_row_major(index, sizes, names) for names in (others, self.axes))
            if self.cut is not None:
                part, rank = self.cut.part_and_rank(rank)
                slice_ = slice_ * self.cut.num_parts(self._num_along_axes) + part
            positions.append(MeshPosition(device_id, slice_, rank, place))
        return positions

    def whole_rank(self, slice_: int, rank: int) -> int:
        """Returns the rank in the group that was cut; -1 stays -1."""
        if self.cut is None or rank < 0:
            return rank
        return self.cut.whole_rank(slice_ % self.cut.num_parts(self._num_along_axes), rank)

    def can_stage(self, *operands: jax.Array | None, scratch_bytes: int = 0) -> bool:
        """Returns whether custom calls can carry a call whose peers read these operands.

        `scratch_bytes`: bytes that peers read beside the operands.
        """
        if self.staging_bytes is None:
            return True
        sizes = [scratch_bytes, *(a.size * a.dtype.itemsize for a in operands if a is not None)]
        unit = limits.STAGING_ALIGNMENT
        return sum(-(-size // unit) * unit for size in sizes) <= self.staging_bytes

    def rank_of(self, device_id: int) -> int:
        """Returns the rank of a device."""
        return self.positions()[self.device_ids.index(device_id)].rank

    def position(self) -> jax.Array:
        """Returns [1] int32, the row-major position of this device in the mesh.

        Call it inside shard_map.
        """
        place = jnp.zeros((1,), jnp.int32)
        for name, size in self.mesh_axes:
            # The mesh of the program may lack an axis of size one.
            if size > 1:
                place = place * size + jax.lax.axis_index(name).astype(jnp.int32)
        return place

    def rank(self) -> jax.Array:
        """Returns the rank of this device, an int32 scalar. Call it inside shard_map."""
        index: jax.Array = jax.lax.axis_index(self.axes)
        if self.cut is None:
            return index
        divide = jax.lax.div if self.cut.is_rail else jax.lax.rem
        return divide(index, jnp.asarray(self.cut.ranks_per_node, index.dtype))

    def index_groups(self) -> list[list[int]] | None:
        """Returns the ranks of every part as JAX's collectives take them; None: nothing is cut."""
        if self.cut is None:
            return None
        num_parts = self.cut.num_parts(self._num_along_axes)
        return [
            [self.cut.whole_rank(part, rank) for rank in range(self.num_ranks)]
            for part in range(num_parts)
        ]

    def cut_into(self, cut: Cut) -> "GroupSpec":
        """Returns the spec of the parts of this group."""
        name = "rails" if cut.is_rail else "nodes"
        return replace(
            self,
            identity=f"{self.identity}-{name}-of-{cut.ranks_per_node}",
            staging_bytes=None,
            has_packets=True,
            low_latency_room=0,
            in_flight_room=0,
            cut=cut,
            levels=None,
        )


@dataclass(frozen=True)
class Levels:
    """The parts of a group with several nodes, and what carries data in them.

    Attributes:
      node: spec of the nodes.
      rail: spec of the rails.
      inside: back end of custom calls inside the nodes; "xla": there are none.
      between: the same for the rails.
    """

    node: GroupSpec
    rail: GroupSpec
    inside: str
    between: str


def _row_major(index: dict[str, int], sizes: dict[str, int], axes: tuple[str, ...]) -> int:
    place = 0
    for name in axes:
        place = place * sizes[name] + index[name]
    return place
