"""dispatch_fp8: rows cross as fp8 and arrive in their own dtype; the gradient does not round."""

import jax

from jax_ep._src.base import config
from jax_ep._src.base.errors import ShapeError
from jax_ep._src.base.handle import Dispatched
from jax_ep._src.base.options import BackendName, FillName, LayoutName, Scales, ScalesName
from jax_ep._src.group.group import Group
from jax_ep._src.ops.common.checks import Checks
from jax_ep._src.ops.common.vary import vary_alike
from jax_ep._src.ops.dispatch import vjp
from jax_ep._src.ops.dispatch.api import assemble, prepare

_check = Checks("dispatch_fp8")


def dispatch_fp8(
    x: jax.Array,
    topk_idx: jax.Array,
    topk_weights: jax.Array | None = None,
    *,
    group: Group,
    num_experts: int,
    layout: LayoutName = "rank",
    recv_capacity: int | None = None,
    expert_alignment: int = 1,
    fill: FillName = "zeros",
    block: int = config.FP8_BLOCK,
    scales: ScalesName = "f32",
    num_sms: int | None = None,
    backend: BackendName | None = None,
) -> Dispatched:
    """Quantises rows to fp8, dispatches them, and dequantises the received rows.

    Half as many bytes cross as with bf16. The gradient is that of a plain dispatch. The fp8 rows
    themselves cannot be differentiated, because JAX would silently round their cotangent to fp8.

    Args:
      x: [num_tokens, hidden] bf16, f16 or f32; hidden a multiple of block and of 16.
      topk_idx: as in dispatch, like all later arguments except block and scales.
      topk_weights: [num_tokens, num_topk] of any floating dtype, or None.
      group: the ranks.
      num_experts: experts of the whole group.
      layout: "rank" or "expert".
      recv_capacity: rows that this rank can receive.
      expert_alignment: expert layout: each group is padded to a multiple of it.
      fill: "zeros", "padding" or "none".
      block: elements per scale.
      scales: "f32" or "e8m0", as in quantize_fp8.
      num_sms: SMs that the call uses on the `cuda` back end, or None.
      backend: "cpu", "cuda", "xla" or None.

    Returns:
      Dispatched; its x has the dtype of the argument x, and its scales are None.

    Collective: every rank of the group calls it, inside jax.shard_map over the group's mesh.
    Gradient: as in dispatch: the rounding counts as the identity (straight-through).
    Raises: as in dispatch.
    Source: DeepSeek-V3 (2024): fp8 dispatch, bf16 backward.
    """
    group = _check.group(group)
    x = _check.rows(x, name="x")
    block = _check.blocks(x, block)
    if x.shape[1] % config.ROW_BYTES_MULTIPLE:
        raise ShapeError(
            f"{_check.op}: x must be [num_tokens, hidden] with hidden a multiple of "
            f"{config.ROW_BYTES_MULTIPLE}, got shape {x.shape}"
        )
    _check.choice(Scales, scales, name="scales")
    spec, topk_idx, weights = prepare(
        _check,
        topk_idx,
        topk_weights,
        num_tokens=x.shape[0],
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
    routed = vjp.dispatch_fp8(spec, (block, scales), x, weights, topk_idx)
    return assemble(spec, topk_idx, routed, has_scales=False)
