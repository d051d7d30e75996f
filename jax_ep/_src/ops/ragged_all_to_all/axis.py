"""The group that runs along a mesh axis, for functions that are called with the axis' name."""

from collections.abc import Sequence
from typing import Any

from jax_ep._src.base import jax_compat, registry
from jax_ep._src.base.errors import GroupError
from jax_ep._src.group.group import Group


def find_group(axis_name: Group | str | Sequence[str], *, op: str) -> Any:
    """Returns a group as it is, or the only open group along the axis or axes of this name."""
    if not isinstance(axis_name, str | tuple | list):
        return axis_name
    axes = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)
    here = {name: size for name, size in jax_compat.manual_axes().items() if size > 1}
    along = [group for group in list(registry.open_groups.values()) if group.axes == axes]
    found = [g for g in along if {n: s for n, s in g.spec.mesh_axes if s > 1} == here]
    if len(found) == 1:
        return found[0]
    named = ", ".join(group.identity for group in found or along) or "none"
    wanted = f"axis {axes[0]!r}" if len(axes) == 1 else f"axes {axes}"
    which = "over a mesh like the one here" if along else "at all"
    raise GroupError(
        f"{op}: axis_name must be a group, or a name along which one open group runs here; along "
        f"{wanted} there are {len(found)} {which}: {named}"
    )
