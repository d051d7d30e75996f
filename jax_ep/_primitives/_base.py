"""make_primitive: one JAX primitive per custom call, the same shape for all of them.

The calls are pure, so JAX may merge, drop or repeat them; it does so alike on every rank.
"""

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from jax_ep._jax_compat import Primitive, ad, batching, mlir, result_aval
from jax_ep.errors import ConfigError

# Shape and dtype of each result, from the operands' avals and the parameters.
ResultsRule = Callable[..., Sequence[tuple[Sequence[int], Any]]]


def make_primitive(
    op: str,
    results: ResultsRule,
    *,
    platforms: Sequence[str],
    attributes: Sequence[str] = (),
    has_position: bool = True,
) -> Callable[..., list[jax.Array]]:
    """Makes the primitive of target `jax_ep.<op>`.

    Args:
      op: the stem of the operation.
      results: the shape rule, called with the operands' avals and the parameters by name.
      platforms: where the target has a twin.
      attributes: the parameters that the handler reads; the others serve the shape rule only.
      has_position: whether the first operand is the device's position in the mesh, which says
        nothing about what the results vary over.

    Returns:
      bind(*operands, **parameters) -> results.
    """
    primitive = Primitive(f"jax_ep.{op}")
    primitive.multiple_results = True

    def abstract_eval(*avals: Any, **parameters: Any) -> list[Any]:
        data = avals[1:] if has_position else avals
        return [result_aval(s, d, data) for s, d in results(*avals, **parameters)]

    def lower(ctx: Any, *operands: Any, **parameters: Any) -> Any:
        call = jax.ffi.ffi_lowering(f"jax_ep.{op}", has_side_effect=False)
        return call(ctx, *operands, **{name: _attribute(parameters[name]) for name in attributes})

    primitive.def_abstract_eval(abstract_eval)
    for platform in platforms:
        mlir.register_lowering(primitive, lower, platform=platform)
    batching.primitive_batchers[primitive] = lambda *_, **__: refuse_batching(op)
    ad.primitive_jvps[primitive] = lambda *_, **__: refuse_jvp(op)

    def bind(*operands: jax.Array, **parameters: Any) -> list[jax.Array]:
        out: list[jax.Array] = primitive.bind(*operands, **parameters)
        return out

    return bind


def refuse_batching(op: str) -> NoReturn:
    """What jax.vmap of an operation gets."""
    raise ConfigError(f"{op}: jax.vmap is not supported; fold the batch into the tokens")


def refuse_jvp(op: str) -> NoReturn:
    """What a derivative of a derivative gets."""
    raise ConfigError(f"{op}: only first derivatives by jax.grad or jax.vjp are supported")


def absent(dtype: Any) -> jax.Array:
    """Stands for an operand that is not there: an attribute says so, the handler never reads it.

    Not an empty array: jaxlib 0.11.2 crashes when it compiles one in an eager shard_map.
    """
    return jnp.zeros((1,), dtype)


def _attribute(value: bool | int | str) -> Any:
    # A Python int would become an int32 attribute; the handlers read int64.
    return value if isinstance(value, str) else np.int64(value)
