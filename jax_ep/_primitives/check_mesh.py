"""check_mesh: the identity, which insists on the mesh that the group was opened with.

JAX knows the devices of a program only when it lowers it, so this is where another mesh, or the
same axes in another device order, is found: an error instead of a misroute.
"""

from typing import Any

import jax

from jax_ep._jax_compat import Primitive, lowering_mesh, mlir
from jax_ep._spec import GroupSpec
from jax_ep.errors import GroupError


def _lower(ctx: Any, x: Any, *, op: str, spec: GroupSpec) -> Any:
    mesh = lowering_mesh(ctx)
    if mesh is not None:
        device_ids = tuple(d.id for d in mesh.devices.flat)
        if tuple(mesh.shape.items()) != spec.mesh_axes or device_ids != spec.device_ids:
            raise GroupError(
                f"{op}: jax.shard_map runs over the mesh {dict(mesh.shape)} with devices "
                f"{device_ids}; the group was opened over {dict(spec.mesh_axes)} with devices "
                f"{spec.device_ids}"
            )
    return [x]


_check_mesh_p = Primitive("jax_ep.check_mesh")
_check_mesh_p.def_abstract_eval(lambda x, *, op, spec: x)
mlir.register_lowering(_check_mesh_p, _lower)


def check_mesh(x: jax.Array, spec: GroupSpec, *, op: str) -> jax.Array:
    """`x`, an integer array. Raises GroupError when the program is lowered for another mesh."""
    checked: jax.Array = _check_mesh_p.bind(x, op=op, spec=spec)
    return checked
