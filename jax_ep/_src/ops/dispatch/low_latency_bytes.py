"""low_latency_bytes, in_flight_bytes: compute the memory of a group for low-latency exchanges."""

from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike

from jax_ep._src.base import config, limits
from jax_ep._src.base.errors import ConfigError
from jax_ep._src.base.options import Quantize, QuantizeName
from jax_ep._src.ops.common.checks import FLOAT_DTYPES, Checks
from jax_ep._src.ops.dispatch.fp8 import FP8_DTYPES, result_dtype

MAX_ROW_BYTES = 1 << 30


def low_latency_bytes(
    *,
    max_tokens_per_rank: int,
    hidden: int,
    num_topk: int,
    num_ranks: int,
    dtype: DTypeLike = jnp.bfloat16,
    quantize: QuantizeName | None = None,
    scales_bytes: int = 0,
    payload_bytes: int = 0,
) -> int:
    """Computes the bytes for `Group.open(low_latency_bytes=...)`.

    Args:
      max_tokens_per_rank: the most tokens of a rank in one call.
      hidden: elements of a row.
      num_topk: experts of each token.
      num_ranks: ranks of the group.
      dtype: dtype of the rows of `low_latency_dispatch` and `low_latency_combine`.
      quantize: as in low_latency_dispatch. The rows of the combine have `dtype`.
      scales_bytes: bytes of a row of the scales that the caller brings.
      payload_bytes: bytes of a row of the payload.

    Returns:
      The number of bytes that each GPU needs: what each rank sends to another, in two halves that
      take turns, from all ranks.

    Collective: no.
    Raises: ConfigError, DTypeError.
    """
    return (
        _bytes_of_half(
            Checks("low_latency_bytes"),
            max_tokens_per_rank=max_tokens_per_rank,
            hidden=hidden,
            num_topk=num_topk,
            num_ranks=num_ranks,
            dtype=dtype,
            quantize=quantize,
            scales_bytes=scales_bytes,
            payload_bytes=payload_bytes,
        )
        * 2
    )


def in_flight_bytes(
    *,
    max_tokens_per_rank: int,
    hidden: int,
    num_topk: int,
    num_ranks: int,
    dtype: DTypeLike = jnp.bfloat16,
    quantize: QuantizeName | None = None,
    scales_bytes: int = 0,
    payload_bytes: int = 0,
) -> int:
    """Computes the bytes for `Group.open(in_flight_bytes=...)`.

    Args:
      max_tokens_per_rank: as in low_latency_bytes; the other arguments, too.
      hidden: elements of a row.
      num_topk: experts of each token.
      num_ranks: ranks of the group.
      dtype: dtype of the rows of `low_latency_dispatch_send` and `low_latency_combine_send`.
      quantize: as in low_latency_dispatch_send.
      scales_bytes: bytes of a row of the scales that the caller brings.
      payload_bytes: bytes of a row of the payload.

    Returns:
      The number of bytes that each GPU needs: twice those of low_latency_bytes, since two exchanges
      may be in flight.

    Collective: no.
    Raises: ConfigError, DTypeError.
    """
    return _bytes_of_half(
        Checks("in_flight_bytes"),
        max_tokens_per_rank=max_tokens_per_rank,
        hidden=hidden,
        num_topk=num_topk,
        num_ranks=num_ranks,
        dtype=dtype,
        quantize=quantize,
        scales_bytes=scales_bytes,
        payload_bytes=payload_bytes,
    ) * (2 * limits.MAX_IN_FLIGHT)


def _bytes_of_half(
    check: Checks,
    *,
    max_tokens_per_rank: int,
    hidden: int,
    num_topk: int,
    num_ranks: int,
    dtype: DTypeLike,
    quantize: QuantizeName | None,
    scales_bytes: int,
    payload_bytes: int,
) -> int:
    """Returns the bytes of what each rank sends to another in one call, from all ranks."""
    tokens = _bounded(check, max_tokens_per_rank, config.MAX_INDEX, name="max_tokens_per_rank")
    num_ranks = _bounded(check, num_ranks, config.MAX_INDEX, name="num_ranks")
    num_topk = _bounded(check, num_topk, limits.MAX_TOPK, name="num_topk")
    width = result_dtype(check, dtype, (*FLOAT_DTYPES, *FP8_DTYPES, jnp.uint8)).itemsize
    hidden = _bounded(check, hidden, MAX_ROW_BYTES // width, name="hidden")
    how = check.choice(Quantize, Quantize.NONE if quantize is None else quantize, name="quantize")
    extra = [
        check.integer(scales_bytes, minimum=0, name="scales_bytes"),
        check.integer(payload_bytes, minimum=0, name="payload_bytes"),
    ]
    sent = [hidden * width]
    if how is not Quantize.NONE:
        if hidden % config.FP8_BLOCK:
            raise ConfigError(
                f"{check.op}: hidden must be a multiple of {config.FP8_BLOCK} for "
                f"quantize={how.value!r}, got {hidden}"
            )
        scale = 1 if how is Quantize.FP8_E8M0 else 4
        sent = [hidden, hidden // config.FP8_BLOCK * scale]
    sent += [min(size, MAX_ROW_BYTES) for size in extra if size]
    sums = [[hidden * width]]
    if (
        hidden % config.FP8_BLOCK == 0
    ):  # narrow sums in fp8 need more: scales have their own packets
        sums.append([hidden, hidden // config.FP8_BLOCK * 4])
    most = max(
        limits.low_latency_payload(tokens, num_topk, sent),
        *(limits.low_latency_payload(tokens, 0, row) for row in sums),
    )
    return num_ranks * most


def _bounded(check: Checks, value: Any, most: int, *, name: str) -> int:
    number = check.integer(value, minimum=1, name=name)
    if number > most:
        raise ConfigError(f"{check.op}: {name} must be at most {most}, got {number}")
    return number
