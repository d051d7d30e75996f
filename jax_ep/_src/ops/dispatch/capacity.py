"""recv_capacity: computes the number of rows that a rank must be able to receive."""

import math

from jax_ep._src.base.checks import StaticChecks
from jax_ep._src.base.errors import ConfigError
from jax_ep._src.base.options import Layout, LayoutName


def recv_capacity(
    *,
    num_tokens: int,
    num_topk: int,
    num_experts: int,
    num_ranks: int,
    layout: LayoutName = "expert",
    expert_alignment: int = 1,
    balance: float | None = 1.25,
) -> int:
    """Computes the rows for `dispatch(recv_capacity=...)`.

    Args:
      num_tokens: tokens of each rank.
      num_topk: experts of each token.
      num_experts: experts of the whole group.
      num_ranks: ranks of the group.
      layout: "rank" or "expert".
      expert_alignment: as in dispatch; each local expert may need up to expert_alignment - 1 rows
        of padding.
      balance: factor on the rows of a perfectly balanced routing. None: the worst case; then no
        row is ever dropped, unless a token names an expert twice.

    Returns:
      The number of rows, at most a bound of the worst case. Expert layout: a multiple of the
      alignment.

    Collective: no.
    Raises: ConfigError.
    """
    check = StaticChecks("recv_capacity")
    num_tokens = check.integer(num_tokens, minimum=1, name="num_tokens")
    num_topk = check.integer(num_topk, minimum=1, name="num_topk")
    num_ranks = check.integer(num_ranks, minimum=1, name="num_ranks")
    num_experts = check.integer(num_experts, minimum=1, name="num_experts")
    alignment = check.integer(expert_alignment, minimum=1, name="expert_alignment")
    if num_experts % num_ranks:
        raise ConfigError(
            f"{check.op}: num_experts must be a multiple of num_ranks={num_ranks}, "
            f"got {num_experts}"
        )
    if balance is not None:
        balance = check.positive_number(balance, name="balance")
    num_local = num_experts // num_ranks
    if check.choice(Layout, layout, name="layout") is Layout.RANK:
        if alignment != 1:
            raise ConfigError(
                f"{check.op}: expert_alignment needs layout='expert', got {alignment}"
            )
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
