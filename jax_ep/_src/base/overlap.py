"""overlap: computes on a second GPU stream while communication runs on the first."""

from collections.abc import Callable
from typing import ParamSpec, TypeVar

from jax_ep._src.base import jax_compat

P = ParamSpec("P")
T = TypeVar("T")


def overlap(fn: Callable[P, T]) -> Callable[P, T]:
    """Returns `fn`, computed at the same time as a dispatch or combine that it does not depend on.

        out = jax_ep.dispatch(x, topk_idx, group=group, num_experts=num_experts)
        shared = jax_ep.overlap(shared_expert)(x, weights)  # on the second stream
        y = jax_ep.combine(experts(out), out.handle) + shared

    The communication stays on XLA's first stream, whose order all ranks share. The computation
    moves to the second stream. Kernels of jax_ep are launched with the highest priority: they get
    SMs before blocks of `fn` that have not begun. `num_sms` limits the SMs that they take.

    XLA of JAX 0.11 runs the calls that it has captured into a command buffer one after the other,
    whatever their streams. Set `XLA_FLAGS=--xla_gpu_enable_command_buffer=` for programs that
    overlap. On Hopper add `--xla_gpu_cublas_fallback=false`: cuBLAS's matmuls hold all SMs until
    they end, and communication that is launched behind them waits.

    Args:
      fn: a function from arrays to arrays, without communication. Must not contain another
        `overlap`.

    Returns:
      A function with the arguments and results of `fn`. On platforms other than GPUs it does
      exactly what `fn` does.

    Collective: no.
    Gradient: the gradient of `fn`, on the second stream as well.
    Raises: JAX's ValueError if `fn` contains another `overlap`.
    Source: the communication hooks of DeepEP (DeepSeek, 2025), turned around.
    """
    return jax_compat.on_second_stream(fn)
