"""beside: computes on a second GPU stream, while communication runs on the first."""

from collections.abc import Callable
from typing import ParamSpec, TypeVar

from jax_ep import _jax_compat

P = ParamSpec("P")
T = TypeVar("T")


def beside(fn: Callable[P, T]) -> Callable[P, T]:
    """Computes `fn` while a dispatch or combine runs that it does not depend on.

        out = jax_ep.dispatch(x, topk_idx, group=group, num_experts=num_experts)
        shared = jax_ep.beside(shared_expert)(x, weights)  # on the second stream
        y = jax_ep.combine(experts(out), out.handle) + shared

    The communication keeps its place on XLA's first stream, whose order all ranks share; the
    computation moves to the second one. Kernels of jax_ep are launched with the highest priority,
    so they get their SMs, `num_sms` of them, before blocks of `fn` that have not begun.

    XLA of JAX 0.11 runs everything in a command buffer one after the other, whatever its stream:
    set `XLA_FLAGS=--xla_gpu_enable_command_buffer=` for programs that overlap. On Hopper, also add
    `--xla_gpu_cublas_fallback=false`: cuBLAS's matmuls hold all SMs until they end, and the
    communication that is launched behind them waits.

    Args:
      fn: takes arrays and returns arrays, without communication. Must not contain another `beside`.

    Returns:
      A function with the arguments and results of `fn`. On other platforms than GPUs it does
      exactly what `fn` does.

    Collective: no.
    Gradient: that of `fn`, on the second stream as well.
    Raises: ValueError, by JAX, if `fn` contains another `beside`.
    Source: the communication hooks of DeepEP (DeepSeek, 2025), turned around.
    """
    return _jax_compat.on_second_stream(fn)
