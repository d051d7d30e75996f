"""low_latency_combine: the combine of a decoding step, with the results of combine."""

from collections.abc import Sequence
from typing import Any, Literal, overload

import jax

from jax_ep._src.base.errors import ConfigError
from jax_ep._src.base.handle import DispatchHandle
from jax_ep._src.base.options import BackendName, ExchangeMode, Quantize, WireName
from jax_ep._src.ops.combine.api import combine_rows
from jax_ep._src.ops.common.checks import Checks

_check = Checks("low_latency_combine")


@overload
def low_latency_combine(
    rows: jax.Array,
    handle: DispatchHandle,
    *,
    weights: jax.Array | None = None,
    bias: jax.Array | Sequence[jax.Array] | None = None,
    wire: WireName | None = None,
    return_rank_mask: Literal[False] = False,
    num_sms: int | None = None,
    backend: BackendName | None = None,
) -> jax.Array: ...


@overload
def low_latency_combine(
    rows: jax.Array,
    handle: DispatchHandle,
    *,
    weights: jax.Array | None = None,
    bias: jax.Array | Sequence[jax.Array] | None = None,
    wire: WireName | None = None,
    return_rank_mask: Literal[True],
    num_sms: int | None = None,
    backend: BackendName | None = None,
) -> tuple[jax.Array, jax.Array]: ...


def low_latency_combine(
    rows: jax.Array,
    handle: DispatchHandle,
    *,
    weights: jax.Array | None = None,
    bias: jax.Array | Sequence[jax.Array] | None = None,
    wire: WireName | None = None,
    return_rank_mask: bool = False,
    num_sms: int | None = None,
    backend: BackendName | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Brings the rows of a decoding step back to their tokens and adds them.

    The results have the bits of `combine`. On the `cuda` back end one kernel adds this rank's rows
    of each token, rounds the sum to the rows' dtype and sends it to the token's rank, which has a
    place for it. Weights at the tokens are moved to the rows before, by another kernel.

    Args:
      rows: [recv_capacity, hidden] bf16, f16 or f32, in the layout of the handle; after a dispatch
        in the layout "batched" also [num_local_experts, rows of an expert, hidden].
      handle: handle of a dispatch, low-latency or not. If that had a rank_mask, terms of ranks that
        it left out are left out here, too, without a wait. So are on the `cuda` back end terms of
        a peer that does not answer within the group's timeout.
      weights: as in combine, but at the rows only after a dispatch with rank_mask; after a dispatch
        in the layout "batched" also [num_local_experts, rows of an expert], like
        `Dispatched.weights`.
      bias: one or two arrays [num_tokens, hidden] of the rows' dtype, added to the result.
      wire: "fp8": what a rank adds up for a token of another rank crosses as float8_e4m3fn with an
        f32 scale for 128 elements, rounded like `quantize="fp8"`; hidden is a multiple of 128 then.
        Each such sum is off by at most 1/16 of itself plus 1/400,000 of the largest of its 128
        elements, or 1e-41. If one of these is NaN or infinite, all 128 are NaN. None: it crosses in
        the rows' dtype. Static.
      return_rank_mask: whether to return also which ranks have taken part; with the handle of a
        dispatch with rank_mask only. Static.
      num_sms: SMs that the kernel uses on the `cuda` back end; None: the group's num_sms, or all.
        Static.
      backend: "cpu", "cuda" or "xla"; None: the group's.

    Returns:
      [num_tokens, hidden] of the rows' dtype; with return_rank_mask a pair of it and a mask
      [num_ranks] bool like `Dispatched.rank_mask`, after this call.

    Collective: every rank of the group calls it, inside jax.shard_map over the group's mesh.
    Gradient: none: jax.grad raises ConfigError.
    Limits: what a rank sends to another must fit into the group's memory: `low_latency_bytes` of
      `Group.open`. On the `cuda` back end a block keeps a table of the rows of its tokens, which
      takes 96 KiB at most: num_ranks * num_topk * tokens of an SM up to 24,576.
    Raises: ShapeError, DTypeError, ConfigError, GroupError while tracing; PeerTimeoutError and
      GroupError from `group.check()`.
    Source: DeepEP (DeepSeek, 2025), low-latency kernels, with sums in f32 and in a fixed order.
    """
    if not isinstance(return_rank_mask, bool):
        raise ConfigError(
            f"{_check.op}: return_rank_mask must be True or False, got {return_rank_mask!r}"
        )
    sums, rank_mask = combine_rows(
        _check,
        rows,
        weights,
        handle,
        bias=bias,
        num_sms=num_sms,
        backend=backend,
        mode=ExchangeMode.LOW_LATENCY,
        wire=format_of(_check, wire),
    )
    if not return_rank_mask:
        return sums
    if rank_mask is None:
        raise ConfigError(
            f"{_check.op}: return_rank_mask needs the handle of a dispatch with rank_mask"
        )
    return sums, rank_mask


def format_of(check: Checks, wire: Any) -> Quantize:
    """Returns the format of sums that cross between ranks."""
    if wire is None:
        return Quantize.NONE
    if isinstance(wire, str) and wire == Quantize.FP8:
        return Quantize.FP8
    raise ConfigError(f"{check.op}: wire must be None or 'fp8', got {wire!r}")
