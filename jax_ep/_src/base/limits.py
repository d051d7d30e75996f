"""Limits of the kernels, read from the native code (xla_ffi/core/limits.def).

`limits.MAX_TOPK` reads kMaxTopk. The CPU module knows the limits of all back ends. The first access
imports it.
"""

from collections.abc import Sequence
from types import ModuleType

from jax_ep._src.base.errors import GroupError


def __getattr__(name: str) -> int:
    if not name.isupper():
        raise AttributeError(name)
    limits: dict[str, int] = _native().limits()
    if name not in limits:
        raise AttributeError(f"no limit {name}: there are {', '.join(limits)}")
    return limits[name]


def slot_payload(num_ranks: int) -> int:
    """Returns the bytes that one rank can send to another in a low-latency sum or norm."""
    size: int = _native().slot_payload(num_ranks)
    return size


def push_payload(num_ranks: int) -> int:
    """Returns the bytes that one rank can push to another in a one-shot.

    Peers read a larger operand in place.
    """
    size: int = _native().push_payload(num_ranks)
    return size


def two_shot_payload(num_ranks: int) -> int:
    """Returns the bytes that one rank can push in a two-shot.

    The room holds a chunk for each rank, and a chunk of the sum.
    """
    size: int = _native().two_shot_payload(num_ranks)
    return size


def low_latency_payload(num_tokens: int, num_topk: int, row_bytes: Sequence[int]) -> int:
    """Returns the bytes that one rank sends to another in a low-latency exchange.

    `num_topk`: 0 for a combine. `row_bytes`: bytes of a row of each array.
    """
    size: int = _native().low_latency_payload(num_tokens, num_topk, list(row_bytes))
    return size


def low_latency_room(num_ranks: int, low_latency_bytes: int) -> int:
    """Returns the bytes that one rank can send to another in a low-latency exchange."""
    size: int = _native().low_latency_room(num_ranks, low_latency_bytes)
    return size


def in_flight_room(num_ranks: int, in_flight_bytes: int) -> int:
    """Returns the bytes that one rank can send to another in an exchange with two halves."""
    size: int = _native().in_flight_room(num_ranks, in_flight_bytes)
    return size


def _native() -> ModuleType:
    try:
        from jax_ep import _jax_ep_cpu
    except ImportError as e:
        raise GroupError(f"the limits of the kernels are in jax_ep's CPU module: {e}") from e
    return _jax_ep_cpu
