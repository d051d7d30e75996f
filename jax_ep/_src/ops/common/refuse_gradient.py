"""refuse_gradient: an identity through which no gradient may flow back."""

from functools import partial
from typing import NoReturn

import jax

from jax_ep._src.base.errors import ConfigError
from jax_ep._src.base.options import ExchangeMode
from jax_ep._src.base.spec import ExchangeSpec


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def refuse_gradient(message: str, x: jax.Array) -> jax.Array:
    """Returns `x`; raises ConfigError if a gradient would flow back through it."""
    return x


def _refuse_gradient_fwd(message: str, x: jax.Array) -> tuple[jax.Array, None]:
    return x, None


def _refuse_gradient_bwd(message: str, residuals: None, ct: jax.Array) -> NoReturn:
    raise ConfigError(message)


refuse_gradient.defvjp(_refuse_gradient_fwd, _refuse_gradient_bwd)


def refuse_low_latency(spec: ExchangeSpec) -> None:
    """Raises ConfigError in the backward pass of a low-latency operation, which has no gradient."""
    if spec.mode is ExchangeMode.LOW_LATENCY:
        plain = spec.op.removeprefix("low_latency_")
        raise ConfigError(
            f"{spec.op} cannot be differentiated; use jax_ep.{plain}, or jax.lax.stop_gradient"
        )
