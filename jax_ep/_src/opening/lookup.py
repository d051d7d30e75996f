"""Lookups for `Group.get`: the mesh, the axis, and the settings that an open group must have."""

from typing import Any

import jax

from jax_ep._src.base import jax_compat, registry
from jax_ep._src.base.errors import GroupError
from jax_ep._src.group.group import Group
from jax_ep._src.opening.arguments import check_axis

Axis = str | tuple[str, ...] | None

_WHAT_TO_DO = "pass mesh=, or call it under jax.set_mesh(mesh)"


def find_mesh(mesh: Any, axis: Axis, name: str | None) -> jax.sharding.Mesh:
    """Returns the mesh with its devices; raises GroupError unless exactly one fits."""
    if isinstance(mesh, jax.sharding.Mesh):
        return mesh
    abstract, known, around = jax_compat.ambient_meshes()
    if isinstance(mesh, jax.sharding.AbstractMesh):
        abstract = mesh
    elif mesh is not None:
        raise GroupError(
            "Group.get: mesh must be a jax.sharding.Mesh, an AbstractMesh or None, "
            f"got {type(mesh).__name__}"
        )
    if abstract.empty:
        raise GroupError(f"Group.get: no mesh is set here: {_WHAT_TO_DO}")
    wanted = _axes_of(abstract)
    alike = [m for m in known if _axes_of(m) == wanted]
    if alike:
        return alike[0]
    axes = check_axis(abstract, find_axis(abstract, axis), op="Group.get")
    name = "_".join(axes) if name is None else name
    groups = [g for g in list(registry.open_groups.values()) if (g.axes, g.name) == (axes, name)]
    if around is not None and _axes_of(around) == wanted:
        if mesh is None and not jax_compat.manual_axes():
            return around
        candidates = [around, *(group.mesh for group in groups)]
    else:
        candidates = [group.mesh for group in groups]
    found = {tuple(m.devices.flat): m for m in candidates if _axes_of(m) == wanted}
    if len(found) == 1:
        return next(iter(found.values()))
    sizes = ", ".join(f"{a!r}: {size}" for a, size in _axes_of(abstract))
    problem = f"Group.get: the devices of the mesh ({sizes}) are not known here, and"
    if found:
        raise GroupError(f"{problem} {len(found)} meshes like it are in use: {_WHAT_TO_DO}")
    raise GroupError(
        f"{problem} no group over a mesh like it along {_listed(axes)} is open: {_WHAT_TO_DO}, or "
        "open the group before"
    )


def find_axis(mesh: Any, axis: Axis) -> str | tuple[str, ...]:
    """Returns the axis or axes of a group; None means the only axis of the mesh."""
    if axis is not None:
        return axis
    if len(mesh.axis_names) != 1:
        raise GroupError(
            f"Group.get: the mesh has the axes {tuple(mesh.axis_names)}: axis= must name one"
        )
    only: str = mesh.axis_names[0]
    return only


def require_settings(group: Group, *, backend: str | None, **wanted: Any) -> None:
    """Raises GroupError unless an open group has the wanted settings; None accepts any."""
    has = {"backend": group.backend, **{name: getattr(group, name) for name in wanted}}
    differing = {
        name: value
        for name, value in {"backend": backend, **wanted}.items()
        if value is not None and value != has[name]
    }
    if differing:
        listed = "; ".join(f"{n}={has[n]!r}, wanted {v!r}" for n, v in differing.items())
        raise GroupError(
            f"Group.get: group {group.identity} is open with other settings: {listed}: close it "
            "first, ask for what it has, or pass another name="
        )
    if backend is None:
        return
    budgets = [b for layouts in group.budgets.of.values() for b in layouts.values()]
    others = {b.backend for b in budgets if b.backend is not None} - {backend}
    if others:
        raise GroupError(
            f"Group.get: group {group.identity} is open with backend='auto', which takes "
            f"{', '.join(sorted(others))} in part, wanted {backend!r} alone: "
            "close it first, or pass another name="
        )


def _axes_of(mesh: Any) -> tuple[tuple[str, int], ...]:
    return tuple(mesh.shape.items())


def _listed(axes: tuple[str, ...]) -> str:
    return f"axis {axes[0]!r}" if len(axes) == 1 else f"axes {axes}"
