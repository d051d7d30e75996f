"""dispatch_fp8: rows cross as fp8 and arrive as what they were; the gradient does not round."""

import jax

from jax_ep import _checks, _differentiable, config
from jax_ep.dispatch import assemble, prepare, vary_alike
from jax_ep.errors import ShapeError
from jax_ep.fp8 import Scales
from jax_ep.group import Group
from jax_ep.handle import Dispatched

_OP = "dispatch_fp8"


def dispatch_fp8(
    x: jax.Array,
    topk_idx: jax.Array,
    topk_weights: jax.Array | None = None,
    *,
    group: Group,
    num_experts: int,
    layout: str = "rank",
    recv_capacity: int | None = None,
    expert_alignment: int = 1,
    fill: str = "zeros",
    block: int = config.FP8_BLOCK,
    scales: str = "f32",
    num_sms: int | None = None,
    backend: str | None = None,
) -> Dispatched:
    """Quantises rows to fp8, dispatches them, and dequantises what arrives.

    Half of bf16's bytes cross. Differentiated, it is the plain dispatch: fp8 itself cannot be,
    since JAX would round its cotangent to fp8 without a word.

    Args:
      x: [num_tokens, hidden] bf16, f16 or f32; hidden a multiple of block and of 16.
      topk_idx: as in dispatch, like all that follow but for block and scales.
      topk_weights: [num_tokens, num_topk] f32 or None.
      group: the ranks.
      num_experts: experts of the whole group.
      layout: "rank" or "expert".
      recv_capacity: rows this rank can receive.
      expert_alignment: expert layout: each group is padded to a multiple of it.
      fill: "zeros", "padding" or "none".
      block: elements per scale.
      scales: "f32" or "e8m0", as in quantize_fp8.
      num_sms: SMs that the call uses on the `cuda` back end, or None.
      backend: "cpu", "cuda", "xla" or None.

    Returns:
      Dispatched; x has the dtype of x, scales is None.

    Collective: every rank of the group calls it. Inside jax.shard_map over the group's mesh.
    Gradient: that of dispatch: the rounding counts as the identity (straight-through).
    Raises: as dispatch.
    Source: DeepSeek-V3 (2024): fp8 dispatch, bf16 backward.
    """
    group = _checks.require_group(group, op=_OP)
    x = _checks.require_rows(x, op=_OP, argument="x")
    block = _checks.require_blocks(x, block, op=_OP)
    if x.shape[1] % config.ROW_BYTES_MULTIPLE:
        raise ShapeError(
            f"{_OP}: hidden must be a multiple of {config.ROW_BYTES_MULTIPLE}, got {x.shape[1]}"
        )
    config.choice(Scales, scales, op=_OP, argument="scales")
    spec, topk_idx, weights = prepare(
        topk_idx,
        topk_weights,
        num_tokens=x.shape[0],
        op=_OP,
        group=group,
        num_experts=num_experts,
        layout=layout,
        recv_capacity=recv_capacity,
        expert_alignment=expert_alignment,
        fill=fill,
        num_sms=num_sms,
        backend=backend,
    )
    x, weights, topk_idx = vary_alike((x, weights, topk_idx), group)
    routed = _differentiable.dispatch_fp8(spec, (block, scales), x, weights, topk_idx)
    return assemble(spec, topk_idx, routed, has_scales=False)
