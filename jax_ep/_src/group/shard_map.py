"""Checks of the jax.shard_map around an operation: the group's mesh, with all axes manual."""

from jax_ep._src.base import jax_compat
from jax_ep._src.base.errors import GroupError
from jax_ep._src.base.group_spec import GroupSpec


def require_mesh_of(spec: GroupSpec, op: str) -> None:
    """Raises GroupError unless the axes here are those of the group's mesh.

    The devices of the two meshes are compared when the program is lowered (check_mesh).
    """
    manual = jax_compat.manual_axes()
    missing = [a for a in spec.axes if a not in manual]
    if missing:
        found = ", ".join(manual) or "none"
        raise GroupError(
            f"{op}: group {spec.identity} runs along axis {', '.join(spec.axes)}: call it "
            f"inside jax.shard_map over the group's mesh; manual axes here: {found}"
        )
    automatic = jax_compat.automatic_axes()
    if automatic:
        raise GroupError(
            f"{op}: every axis of the mesh must be manual in jax.shard_map; automatic here: "
            f"{', '.join(automatic)}"
        )
    expected = {name: size for name, size in spec.mesh_axes if size > 1}
    got = {name: size for name, size in manual.items() if size > 1}
    if expected != got:
        raise GroupError(
            f"{op}: group {spec.identity} was opened over the mesh {expected}, "
            f"but runs inside jax.shard_map over {got}"
        )
