"""What a group tells about itself."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from jax_ep._native_group import NativeGroup

if TYPE_CHECKING:
    from jax_ep.group import Group


@dataclass(frozen=True)
class GroupInfo:
    """What `Group.info()` tells.

    Attributes:
      identity: what compiled code carries; equal in every process.
      axes: the mesh axes that the ranks run along.
      num_ranks: ranks of one slice.
      num_slices: independent copies of the group along the mesh's other axes.
      ranks_per_node: ranks that share memory at full speed.
      backend: the back end in use.
      backends: every back end, and why it is or is not usable here.
      staging: why, and up to how much, operands are copied to where peers can read them, and what
        is done with larger ones; None: peers read operands in place.
      devices: one line per device, in mesh order.
      timeout: seconds that a rank waits for its peers.
      num_sms: SMs that all dispatches and combines use on GPUs unless they say otherwise, as
        `Group.open` was told; None: `budgets` by operation and layout.
      budgets: by operation and layout the SMs in use on the `cuda` back end, or "xla" where "auto"
        takes that back end. "cached_dispatch" is a dispatch along a handle, and what moves single
        numbers; a gradient has the budget of the operation that it is.
      budgets_from: where they come from.
      debug: whether routings are checked on the device.
    """

    identity: str
    axes: tuple[str, ...]
    num_ranks: int
    num_slices: int
    ranks_per_node: int
    backend: str
    backends: dict[str, str]
    staging: str | None
    devices: tuple[str, ...]
    timeout: float
    num_sms: int | None
    budgets: dict[str, dict[str, int | str]]
    budgets_from: str
    debug: bool


def describe(group: "Group", native: NativeGroup | None) -> GroupInfo:
    """`native`: the native half of the group, if it has one."""
    return GroupInfo(
        identity=group.identity,
        axes=group.axes,
        num_ranks=group.num_ranks,
        num_slices=group.mesh.size // group.num_ranks,
        ranks_per_node=group.ranks_per_node,
        backend=group.backend,
        backends={name: usability.reason for name, usability in group.backends.items()},
        staging=_staging(native),
        devices=tuple(str(d) for d in group.mesh.devices.flat),
        timeout=group.timeout,
        num_sms=group.num_sms,
        budgets={
            exchange: {layout.name.lower(): b.backend or b.sms for layout, b in layouts.items()}
            for exchange, layouts in group.budgets.of.items()
        },
        budgets_from=group.budgets.source,
        debug=group.debug,
    )


def _staging(native: NativeGroup | None) -> str | None:
    if native is None or native.why_staged is None or native.staging_bytes is None:
        return None
    return (
        f"operands of up to {native.staging_bytes >> 20} MiB a call are copied before peers "
        f"read them, larger ones take back end 'xla': {native.why_staged}"
    )
