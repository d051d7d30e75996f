"""The description that a group gives of itself."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jax_ep._src.base import config
from jax_ep._src.processes.native_group import NativeGroup

if TYPE_CHECKING:
    from jax_ep._src.group.group import Group


@dataclass(frozen=True)
class GroupInfo:
    """The result of `Group.info()`.

    Attributes:
      identity: name and fingerprint that compiled code carries; equal in every process.
      axes: mesh axes along which the ranks run.
      num_ranks: ranks of one slice.
      num_slices: independent copies of the group along the mesh's other axes.
      ranks_per_node: ranks of one node.
      ranks_per_node_from: origin of that number: the argument, the hosts, or why all ranks are one
        node.
      transport: what carries rows between the nodes in dispatch and combine, and why, and what
        carries them inside the nodes; None: the group has one node.
      backend: the back end in use.
      backends: every back end, and why it is or is not usable here.
      staging: why operands are copied to memory that peers can read, the largest size of a copy,
        and the fate of larger operands; None: peers read operands in place.
      devices: one line per device, in mesh order.
      timeout: seconds that a rank waits for its peers.
      num_sms: the argument of `Group.open`: SMs that every dispatch and combine uses on GPUs
        unless the call says otherwise; None: `budgets` give the number, for many tokens.
      budgets: SMs in use on the `cuda` back end by exchange and layout, or "xla" if "auto" takes
        that back end. "cached_dispatch" is a dispatch along a handle, or a move of single numbers.
        A gradient has the budget of the exchange that it runs.
      budgets_from: origin of the budgets.
      low_latency: which calls the kernels for few tokens carry, and their room.
      survives: whether the group goes on without processes that were lost.
      left_out: ranks that calls with a rank_mask leave out from now on, on the `cuda` back end, as
        the devices of this process know it: the mask has left them out, or they have not answered.
      in_flight: whether these can send and receive apart, and their room for that.
      debug: whether routings are checked on the device.
    """

    identity: str
    axes: tuple[str, ...]
    num_ranks: int
    num_slices: int
    ranks_per_node: int
    ranks_per_node_from: str
    transport: str | None
    backend: str
    backends: dict[str, str]
    staging: str | None
    devices: tuple[str, ...]
    timeout: float
    num_sms: int | None
    budgets: dict[str, dict[str, int | str]]
    budgets_from: str
    low_latency: str
    survives: bool
    left_out: tuple[int, ...]
    in_flight: str
    debug: bool


def describe(
    group: "Group", natives: Sequence[NativeGroup], left_out: tuple[int, ...]
) -> GroupInfo:
    """Describes a group. `natives`: the native halves of the group and its parts."""
    return GroupInfo(
        identity=group.identity,
        axes=group.axes,
        num_ranks=group.num_ranks,
        num_slices=group.mesh.size // group.num_ranks,
        ranks_per_node=group.ranks_per_node,
        ranks_per_node_from=group.nodes.origin,
        transport=_transport(group),
        backend=group.backend,
        backends={name: usability.reason for name, usability in group.backends.items()},
        staging=_staging(natives),
        devices=tuple(str(d) for d in group.mesh.devices.flat),
        timeout=group.timeout,
        num_sms=group.num_sms,
        budgets={
            exchange: {layout.value: b.backend or b.sms for layout, b in layouts.items()}
            for exchange, layouts in group.budgets.of.items()
        },
        budgets_from=group.budgets.source,
        low_latency=_low_latency(group),
        survives=group.survives,
        left_out=left_out,
        in_flight=_in_flight(group),
        debug=group.debug,
    )


def _low_latency(group: "Group") -> str:
    room = group.spec.low_latency_room
    if group.backend != "cuda":
        return f"not needed: back end {group.backend!r} has one way for all numbers of tokens"
    if not group.spec.has_packets:
        return "not usable: 16 bytes do not arrive at once at all peers"
    if room == 0:
        return "not usable: low_latency_bytes=0"
    users = "low-latency operations"
    if group.parts:
        users += " (not by dispatch and combine, which run in two levels)"
    elif group.num_sms is None:
        users += f", and by dispatch and combine of up to {config.MAX_FEW_TOKENS} tokens"
    return f"usable by {users}: a rank may send {room} bytes to another in one call"


def _in_flight(group: "Group") -> str:
    room = group.spec.in_flight_room
    if group.backend != "cuda" or not group.spec.has_packets:
        return "a receive makes the whole exchange"
    if room == 0:
        return "not usable: in_flight_bytes=0"
    return f"usable: a rank may send {room} bytes to another in one call"


def _staging(natives: Sequence[NativeGroup]) -> str | None:
    for native in natives:
        if native.why_staged is not None and native.staging_bytes is not None:
            return (
                f"operands of up to {native.staging_bytes >> 20} MiB a call are copied before "
                f"peers read them, larger ones take back end 'xla': {native.why_staged}"
            )
    return None


def _transport(group: "Group") -> str | None:
    if not group.parts:
        return None
    if group.backend == "xla":
        return "xla: JAX's collectives, also inside the nodes, since the group's back end is 'xla'"
    node, rail = group.parts
    inside = f"inside the nodes back end {node.backend!r}{_why_stock(node)}"
    if rail.backend == "xla":
        return f"xla: JAX's collectives{_why_stock(rail)}; {inside}"
    return (
        f"mapped: ranks of different nodes read one another's memory, back end {rail.backend!r}; "
        f"{inside}"
    )


def _why_stock(part: "Group") -> str:
    """Returns the reason, in brackets, if JAX's collectives carry a part on CPUs or GPUs."""
    own = {"cpu": "cpu", "gpu": "cuda"}.get(part.mesh.devices.flat[0].platform)
    return "" if part.backend != "xla" or own is None else f" ({part.backends[own].reason})"
