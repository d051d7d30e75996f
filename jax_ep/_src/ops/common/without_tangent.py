"""without_tangent: an identity on integers whose result has no tangent in JAX.

JAX gives every result of a custom_vjp a tangent; the tangent of integers has type float0. If such a
result enters another custom_vjp, as a handle enters combine, JAX 0.10 to 0.12 lose the axis of
jax.vmap(spmd_axis_name=) in the type of that tangent, and refuse the backward pass.
"""

from typing import Any

import jax

from jax_ep._src.base.jax_compat import Primitive, ad, batching, mlir


def _batch(operands: Any, dims: Any) -> Any:
    return _without_tangent_p.bind(*operands), dims[0]


def _jvp(primals: Any, tangents: Any) -> Any:
    out = _without_tangent_p.bind(*primals)
    return out, ad.Zero(jax.typeof(out).to_tangent_aval())


_without_tangent_p = Primitive("jax_ep.without_tangent")
_without_tangent_p.def_abstract_eval(lambda x: x)
mlir.register_lowering(_without_tangent_p, lambda ctx, x: [x])
batching.primitive_batchers[_without_tangent_p] = _batch
ad.primitive_jvps[_without_tangent_p] = _jvp


def without_tangent(x: jax.Array) -> jax.Array:
    """Returns `x`, an array of integers, without a tangent."""
    same: jax.Array = _without_tangent_p.bind(x)
    return same
