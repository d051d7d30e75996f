"""Common parts of the halves of an exchange: a send starts it, and a receive ends it."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NoReturn, TypeVar

import jax
import jax.numpy as jnp

from jax_ep._src.base.errors import ConfigError
from jax_ep._src.base.handle import InFlight
from jax_ep._src.base.spec import DispatchSpec, RouteSpec
from jax_ep._src.ops.common.checks import Checks
from jax_ep._src.ops.common.primitive import Result

FLIGHT_WORDS = 2
_Spec = TypeVar("_Spec", DispatchSpec, RouteSpec)


def flight() -> Result:
    """Returns shape and dtype of the array that joins the halves."""
    return Result((FLIGHT_WORDS,), jnp.int32)


def refuse_batch(*_: Any, op: str, **__: Any) -> NoReturn:
    """The batch rule of the halves: a batch would have too many exchanges in flight."""
    raise ConfigError(f"{op}: jax.vmap is not supported: at most two exchanges may be in flight")


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def without_gradient(op: str, fn: Callable[..., Any], *operands: Any) -> Any:
    """Returns fn(*operands); raises ConfigError if a gradient would flow back through it."""
    return fn(*operands)


def _fwd(op: str, fn: Callable[..., Any], *operands: Any) -> tuple[Any, None]:
    return fn(*operands), None


def _bwd(op: str, fn: Callable[..., Any], residuals: None, ct: Any) -> NoReturn:
    plain = op.removeprefix("low_latency_").removesuffix("_send").removesuffix("_recv")
    raise ConfigError(
        f"{op} cannot be differentiated; use jax_ep.{plain}, or jax.lax.stop_gradient"
    )


without_gradient.defvjp(_fwd, _bwd)


def leaves_of(check: Checks, arrays: Any, *, name: str) -> list[jax.Array]:
    """Returns the arrays of a pytree that a call waits for, or passes through."""
    return [check.array(leaf, name=name) for leaf in jax.tree.leaves(arrays)]


def behind(arrays: Any, *others: Any) -> Any:
    """Returns `arrays`, which XLA computes no earlier than the others: for stock collectives."""
    joined, *_ = jax.lax.optimization_barrier((arrays, *others))
    return joined


def no_flight(operands: Sequence[jax.Array]) -> jax.Array:
    """Returns the number of an exchange that its receive makes, behind the operands of the send."""
    zeros = jnp.zeros((FLIGHT_WORDS,), jnp.int32)
    joined: jax.Array = behind(zeros, *operands)
    return joined


def require_in_flight(check: Checks, in_flight: Any, kind: type[_Spec]) -> _Spec:
    """Checks the argument of a receive, and returns its spec."""
    send = f"{check.op.removesuffix('_recv')}_send"
    if not isinstance(in_flight, InFlight) or not isinstance(in_flight.spec, kind):
        got = type(in_flight).__name__
        if isinstance(in_flight, InFlight):
            got = f"that of {in_flight.spec.op}"
        raise ConfigError(f"{check.op}: in_flight must be the result of {send}, got {got}")
    return in_flight.spec
