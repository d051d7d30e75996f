"""check_mesh: an identity that is lowered only for the mesh that the group was opened over.

JAX knows the devices of a program only when it lowers the program. So the lowering of check_mesh
finds another mesh, or another device order, and raises an error before rows can be misrouted.
"""

from typing import Any

import jax

from jax_ep._src.base.errors import GroupError
from jax_ep._src.base.group_spec import GroupSpec
from jax_ep._src.base.jax_compat import Primitive, ad, batching, lowering_mesh, mlir
from jax_ep._src.ops.common.primitive import refuse_jvp


def _lower(ctx: Any, x: Any, *, op: str, spec: GroupSpec, has_jvp: bool) -> Any:
    mesh = lowering_mesh(ctx)
    if mesh is not None:
        device_ids = tuple(d.id for d in mesh.devices.flat)
        axes = {name: size for name, size in mesh.shape.items() if size > 1}
        expected = {name: size for name, size in spec.mesh_axes if size > 1}
        if list(axes.items()) != list(expected.items()) or device_ids != spec.device_ids:
            raise GroupError(
                f"{op}: jax.shard_map runs over the mesh {axes} with devices "
                f"{device_ids}; the group was opened over {expected} with devices "
                f"{spec.device_ids}"
            )
    return [x]


def _batch(operands: Any, dims: Any, **parameters: Any) -> Any:
    return _check_mesh_p.bind(*operands, **parameters), dims[0]


def _jvp(primals: Any, tangents: Any, *, op: str, has_jvp: bool, **parameters: Any) -> Any:
    if not has_jvp:
        refuse_jvp(op)
    return _check_mesh_p.bind(*primals, op=op, has_jvp=has_jvp, **parameters), tangents[0]


_check_mesh_p = Primitive("jax_ep.check_mesh")
_check_mesh_p.def_abstract_eval(lambda x, **_: x)
mlir.register_lowering(_check_mesh_p, _lower)
batching.primitive_batchers[_check_mesh_p] = _batch
ad.primitive_jvps[_check_mesh_p] = _jvp


def check_mesh(x: jax.Array, spec: GroupSpec, *, op: str, has_jvp: bool = False) -> jax.Array:
    """Returns `x`. Raises GroupError when the program is lowered for another mesh.

    `has_jvp`: whether check_mesh has a derivative; without one the error names `op`.
    """
    checked: jax.Array = _check_mesh_p.bind(x, op=op, spec=spec, has_jvp=has_jvp)
    return checked
