"""low_latency_bytes: computes the memory of a group for low-latency exchanges."""

import jax.numpy as jnp
from jax.typing import DTypeLike

from jax_ep._src.base import config, limits
from jax_ep._src.base.checks import StaticChecks
from jax_ep._src.base.options import Quantize, QuantizeName


def low_latency_bytes(
    *,
    max_tokens_per_rank: int,
    hidden: int,
    num_topk: int,
    num_ranks: int,
    dtype: DTypeLike = jnp.bfloat16,
    quantize: QuantizeName | None = None,
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
      payload_bytes: bytes of a row of the payload, and of scales that the caller brings.

    Returns:
      The number of bytes that each GPU needs: what each rank sends to another, in two halves that
      take turns, from all ranks.

    Collective: no.
    Raises: ConfigError.
    """
    check = StaticChecks("low_latency_bytes")
    tokens = check.integer(max_tokens_per_rank, minimum=1, name="max_tokens_per_rank")
    hidden = check.integer(hidden, minimum=1, name="hidden")
    num_topk = check.integer(num_topk, minimum=1, name="num_topk")
    num_ranks = check.integer(num_ranks, minimum=1, name="num_ranks")
    extra = check.integer(payload_bytes, minimum=0, name="payload_bytes")
    row = hidden * jnp.dtype(dtype).itemsize
    sent = [row]
    how = check.choice(Quantize, quantize or Quantize.NONE, name="quantize")
    if how is not Quantize.NONE:
        scale = 1 if how is Quantize.FP8_E8M0 else 4
        sent = [hidden, -(-hidden // config.FP8_BLOCK) * scale]
    sent += [extra] if extra else []
    most = max(
        limits.low_latency_payload(tokens, num_topk, sent),
        limits.low_latency_payload(tokens, 0, [row]),
    )
    return 2 * num_ranks * most
