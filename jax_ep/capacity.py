"""recv_capacity: how many rows a rank must be able to receive."""

import math

from jax_ep import _checks, config
from jax_ep.config import Layout
from jax_ep.errors import ConfigError


def recv_capacity(
    *,
    num_tokens: int,
    num_topk: int,
    num_experts: int,
    num_ranks: int,
    layout: str = "expert",
    expert_alignment: int = 1,
    balance: float | None = 1.25,
) -> int:
    """Rows for `dispatch(recv_capacity=...)`.

    Args:
      num_tokens: tokens of each rank.
      num_topk: experts of each token.
      num_experts: experts of the whole group.
      num_ranks: ranks of the group.
      layout: "rank" or "expert".
      expert_alignment: as in dispatch; each local expert may need up to that much less one row of
        padding.
      balance: how many times the rows of a perfectly balanced routing; None: the worst case, with
        which nothing is ever dropped, unless a token names an expert twice.

    Returns:
      Rows; never more than a bound of what the worst case needs. Expert layout: a multiple of the
      alignment.

    Collective: no.
    Raises: ConfigError.
    """
    op = "recv_capacity"
    num_tokens = config.require_int(num_tokens, minimum=1, op=op, argument="num_tokens")
    num_topk = config.require_int(num_topk, minimum=1, op=op, argument="num_topk")
    num_ranks = config.require_int(num_ranks, minimum=1, op=op, argument="num_ranks")
    num_experts = config.require_int(num_experts, minimum=1, op=op, argument="num_experts")
    alignment = config.require_int(expert_alignment, minimum=1, op=op, argument="expert_alignment")
    if num_experts % num_ranks:
        raise ConfigError(
            f"{op}: num_experts must be a multiple of num_ranks={num_ranks}, got {num_experts}"
        )
    if balance is not None:
        balance = _checks.require_positive_number(balance, op=op, argument="balance")
    num_local = num_experts // num_ranks
    if config.choice(Layout, layout, op=op, argument="layout") is Layout.RANK:
        if alignment != 1:
            raise ConfigError(f"{op}: expert_alignment needs layout='expert', got {alignment}")
        worst = num_tokens * num_ranks
        # A token reaches a rank unless all of its choices fall elsewhere.
        missed = math.prod(
            (num_experts - num_local - i) / (num_experts - i)
            for i in range(min(num_topk, num_experts))
        )
        expected = worst * (1.0 - max(missed, 0.0))
        return worst if balance is None else min(worst, math.ceil(expected * balance))
    padding = num_local * (alignment - 1)
    worst = num_tokens * num_ranks * min(num_topk, num_local) + padding
    rows = worst
    if balance is not None:
        rows = min(worst, math.ceil(num_tokens * num_topk * balance) + padding)
    return -(-rows // alignment) * alignment
