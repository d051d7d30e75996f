"""make_primitive: makes the JAX primitive of a custom call; all primitives have one form.

The calls are pure, so JAX may merge, drop or repeat them. It does so alike on every rank.
Calls that come in pairs are not pure.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from jax_ep._src.base import native_modules
from jax_ep._src.base.errors import ConfigError
from jax_ep._src.base.jax_compat import (
    Primitive,
    ad,
    batching,
    behind_barriers,
    mlir,
    number_in_program,
    result_aval,
    vary_alike,
)
from jax_ep._src.base.options import Option

Result = jax.ShapeDtypeStruct
# (operands' avals), parameters -> pytree of Result.
ResultsRule = Callable[..., Any]
# (operands' avals), parameters -> axes of the mesh.
VaryingRule = Callable[..., frozenset[str]]
# (operands, batch dimensions), parameters -> (results, batch dimensions).
BatchRule = Callable[..., tuple[Sequence[Any], Sequence[int]]]
# (operands' avals), parameters -> {index of an operand: index of a result}.
AliasRule = Callable[..., dict[int, int]]


def make_primitive(
    stem: str,
    results: ResultsRule,
    *,
    platforms: Sequence[str],
    attributes: Sequence[str] = (),
    has_position: bool = True,
    varying: VaryingRule | None = None,
    batch: BatchRule | None = None,
    aliases: AliasRule | None = None,
    is_pure: bool = True,
) -> Callable[..., Any]:
    """Makes the primitive of target `jax_ep.<stem>`.

    Args:
      stem: stem of the operation.
      results: shape rule, called with the operands' avals and the parameters by name.
      platforms: platforms for which the target has a handler.
      attributes: parameters that the handler reads; the others serve the shape rule only. An
        operation with `group` among them is collective: its calls get names, and its parameter
        `op` is the name of the public operation in errors.
      has_position: whether the first operand is the device's position in the mesh. The position
        says nothing about the axes that the results vary over.
      varying: rule for the axes that the results vary over, called like `results`; None: all axes
        that an operand varies over.
      batch: rule of jax.vmap; None: one call for each element, in order.
      aliases: rule for the operands over which results are written; XLA copies an operand that is
        still used. None: no operand.
      is_pure: whether XLA may merge, drop or repeat a call.

    Returns:
      bind(*operands, **parameters) -> arrays in the pytree that `results` returns.
    """
    primitive = Primitive(f"jax_ep.{stem}")
    primitive.multiple_results = True

    def abstract_eval(*avals: Any, **parameters: Any) -> list[Any]:
        data = avals[1:] if has_position else avals
        axes = None if varying is None else varying(*avals, **parameters)
        return [
            result_aval(result.shape, result.dtype, data, varying=axes)
            for result in jax.tree.leaves(results(*avals, **parameters))
        ]

    def lower(platform: str, ctx: Any, *operands: Any, **parameters: Any) -> Any:
        values = {name: _attribute(parameters[name]) for name in attributes}
        if "group" in values:
            number = number_in_program(ctx)
            if number == 0 and platform == "cpu":
                native_modules.load(platform).begin_program()
            values["call"] = _name_call(stem, parameters["op"], number, ctx, values)
            del values["group"]
        shared = {} if aliases is None else aliases(*ctx.avals_in, **parameters)
        call = jax.ffi.ffi_lowering(
            f"jax_ep.{stem}", has_side_effect=not is_pure, operand_output_aliases=shared
        )
        if platform != "cuda":
            return call(ctx, *operands, **values)
        # XLA for GPUs fuses a call with a slice of a loop's result that is written from it. It
        # makes the call once more for all others who use its results. It also fuses a call with
        # slices that it reads, and then keeps a call that is not pure beside the fused one.
        given = operands if is_pure else behind_barriers(operands)
        return behind_barriers(call(ctx, *given, **values))

    def one_by_one(
        operands: Sequence[Any], dims: Sequence[int | None], **parameters: Any
    ) -> tuple[Sequence[Any], Sequence[int]]:
        def element(i: int) -> list[Any]:
            return [
                a if dim is None else jax.lax.index_in_dim(a, i, dim, keepdims=False)
                for a, dim in zip(operands, dims, strict=True)
            ]

        size = batch_size(operands, dims)
        if size > 0:
            calls = [primitive.bind(*element(i), **parameters) for i in range(size)]
            stacked = [jnp.stack(each) for each in zip(*calls, strict=True)]
        else:
            avals = [_without(a, dim) for a, dim in zip(operands, dims, strict=True)]
            data = operands[1:] if has_position else operands
            stacked = [
                vary_alike((jnp.zeros((0, *result.shape), result.dtype), *data), ())[0]
                for result in jax.tree.leaves(results(*avals, **parameters))
            ]
        return stacked, [0] * len(stacked)

    primitive.def_abstract_eval(abstract_eval)
    for platform in platforms:
        # Two calls that share a lowering would share a name, so lowerings are not cached.
        rule = partial(lower, platform)
        mlir.register_lowering(primitive, rule, platform=platform, cacheable=False)
    batching.primitive_batchers[primitive] = batch or one_by_one
    ad.primitive_jvps[primitive] = lambda *_, **parameters: refuse_jvp(parameters.get("op", stem))

    def bind(*operands: jax.Array, **parameters: Any) -> Any:
        structure = jax.tree.structure(results(*operands, **parameters))
        return jax.tree.unflatten(structure, primitive.bind(*operands, **parameters))

    return bind


def refuse_jvp(op: str) -> NoReturn:
    """Raises ConfigError for a second derivative, and for forward mode."""
    raise ConfigError(f"{op}: only first derivatives by jax.grad or jax.vjp are supported")


def batch_size(operands: Sequence[Any], dims: Sequence[int | None]) -> int:
    """Returns the number of elements in the batch of a batch rule's operands."""
    size: int = next(a.shape[d] for a, d in zip(operands, dims, strict=True) if d is not None)
    return size


def _without(array: Any, dim: int | None) -> jax.ShapeDtypeStruct:
    """Returns the shape and dtype of one element of a batch."""
    shape = tuple(size for place, size in enumerate(array.shape) if place != dim)
    return jax.ShapeDtypeStruct(shape, array.dtype)


def batch_at(array: jax.Array, dim: int | None, place: int, size: int) -> jax.Array:
    """Moves the batch dimension of an operand to `place`; repeats an operand that has none."""
    if dim is None:
        return jnp.broadcast_to(
            jnp.expand_dims(array, place), (*array.shape[:place], size, *array.shape[place:])
        )
    return jnp.moveaxis(array, dim, place)


def absent(dtype: Any) -> jax.Array:
    """Stands for an operand that is not there: an attribute says so, the handler never reads it.

    The array has one element: jaxlib 0.11.2 crashes when it compiles an empty array in an eager
    shard_map.
    """
    return jnp.zeros((1,), dtype)


def _name_call(stem: str, op: str, number: int, ctx: Any, attributes: Mapping[str, Any]) -> str:
    """Returns a name for a call from its content and place in the program, equal in all processes.

    The group's identity comes first: a loaded executable finds its group by it. The public
    operation comes last: errors name the call by it. xla_ffi/ops/op_site.h parses the name.
    """
    content = [
        stem,
        op,
        *(f"{name}={value}" for name, value in sorted(attributes.items())),
        *(f"{aval.dtype}{list(aval.shape)}" for aval in (*ctx.avals_in, *ctx.avals_out)),
        str(number),
    ]
    digest = hashlib.blake2b("\n".join(content).encode(), digest_size=8)
    return f"{attributes['group']}#{digest.hexdigest()}#{op}"


def _attribute(value: bool | int | float | str | Option) -> Any:
    # JAX would pass a Python int as an int32 attribute, but the handlers read int64.
    if isinstance(value, Option):
        return np.int64(value.code)
    if isinstance(value, float):
        return np.float32(value)
    return value if isinstance(value, str) else np.int64(value)
