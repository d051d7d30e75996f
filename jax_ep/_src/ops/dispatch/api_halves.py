"""low_latency_dispatch_send and low_latency_dispatch_recv: a low-latency dispatch in two halves."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax

from jax_ep._src.base import registry
from jax_ep._src.base.handle import Dispatched, InFlight
from jax_ep._src.base.options import BackendName, LowLatencyLayoutName, QuantizeName
from jax_ep._src.base.spec import DispatchSpec
from jax_ep._src.group.group import Group
from jax_ep._src.ops.common import halves
from jax_ep._src.ops.common.checks import Checks
from jax_ep._src.ops.common.few_tokens import require_dispatch_halves
from jax_ep._src.ops.common.vary import vary_alike
from jax_ep._src.ops.dispatch import call_halves
from jax_ep._src.ops.dispatch.api_low_latency import assemble_low_latency, prepare_low_latency

_check_send = Checks("low_latency_dispatch_send")
_check_recv = Checks("low_latency_dispatch_recv")


def low_latency_dispatch_send(
    x: jax.Array | tuple[jax.Array, jax.Array],
    topk_idx: jax.Array,
    topk_weights: jax.Array | None = None,
    *,
    group: Group,
    num_experts: int,
    max_tokens_per_rank: int,
    recv_capacity: int | None = None,
    layout: LowLatencyLayoutName = "expert",
    quantize: QuantizeName | None = None,
    payload: jax.Array | None = None,
    num_sms: int | None = None,
    backend: BackendName | None = None,
    after: Any = (),
    through: Any = None,
) -> InFlight:
    """Sends the tokens of a low_latency_dispatch, and waits for nobody.

        sent = jax_ep.low_latency_dispatch_send(x, topk_idx, topk_weights, ..., through=x)
        shared = shared_expert(sent.through)  # computed behind the send
        out = jax_ep.low_latency_dispatch_recv(sent, after=shared)

    On the `cuda` back end the send is the whole transfer. What is computed between the halves hides
    that peers arrive later, and the way of their last bytes. On the other back ends the receive is
    the whole exchange.

    Data orders the halves and what lies between them: XLA may move whatever does not depend on
    them. At most two exchanges of a rank, dispatches and combines together, may be in flight: sent
    and not received. One more is an error that `group.check()` raises, and overwrites nothing. Each
    send has exactly one receive; exchanges in flight may be received in any order, the same on all
    ranks.

    Args:
      x: as in low_latency_dispatch, as are all arguments down to backend.
      topk_idx: [num_tokens, num_topk] int32 or int64.
      topk_weights: [num_tokens, num_topk] of any floating dtype; or None.
      group: the ranks. Static.
      num_experts: experts of the whole group, a multiple of its ranks. Static.
      max_tokens_per_rank: the most tokens of any call. Static.
      recv_capacity: rows that this rank can receive; None: the worst case, and the `cuda` back end
        takes no less.
      layout: "expert", "rank" or "batched".
      quantize: None, "fp8", "fp8_pow2" or "fp8_e8m0".
      payload: [num_tokens, P] of any type of whole bytes; or None.
      num_sms: SMs that each half uses on the `cuda` back end. Static.
      backend: "cpu", "cuda" or "xla"; None: the group's.
      after: arrays, in any pytree, that must have been computed before: for example the result of
        the receive that makes room for this send.
      through: arrays, in any pytree, that the send passes through unchanged, as `through` of the
        result: what is computed from these begins behind the send. XLA copies them if the caller
        goes on using the originals.

    Returns:
      InFlight, which low_latency_dispatch_recv takes. It holds x, topk_idx and topk_weights, which
      the receive reads.

    Collective: every rank of the group calls it, inside jax.shard_map over the group's mesh.
    Gradient: none: jax.grad raises ConfigError, and so does jax.vmap.
    Limits: as low_latency_dispatch, with `in_flight_bytes` of `Group.open`, which is 0 by default.
    Raises: ShapeError, DTypeError, ConfigError, GroupError while tracing; GroupError and
      RoutingError (debug mode) from `group.check()`.
    Source: DeepEP (DeepSeek, 2025), the receive hooks of its low-latency kernels.
    """
    check = _check_send
    spec, rows, topk_weights, topk_idx, has_scales = prepare_low_latency(
        check,
        x,
        topk_idx,
        topk_weights,
        group=group,
        num_experts=num_experts,
        max_tokens_per_rank=max_tokens_per_rank,
        recv_capacity=recv_capacity,
        layout=layout,
        quantize=quantize,
        payload=payload,
        num_sms=num_sms,
        backend=backend,
    )
    require_dispatch_halves(spec, topk_idx.shape, rows)
    waits_for = halves.leaves_of(check, after, name="after")
    passed = halves.leaves_of(check, through, name="through")
    tokens = call_halves.Tokens(topk_idx, topk_weights, rows)
    operands = vary_alike((tokens, waits_for, passed), group)
    number, passed = halves.without_gradient(
        spec.op, partial(call_halves.dispatch_send, spec), *operands
    )
    return InFlight(
        number=number,
        through=jax.tree.unflatten(jax.tree.structure(through), passed),
        operands=operands[0],
        spec=spec,
        has_scales=has_scales,
    )


def low_latency_dispatch_recv(in_flight: InFlight, *, after: Any = ()) -> Dispatched:
    """Receives the tokens that low_latency_dispatch_send has sent, on all ranks.

    Args:
      in_flight: the result of the send. It is received once.
      after: arrays, in any pytree, that must have been computed before: what the wait for the peers
        is to hide behind.

    Returns:
      Dispatched: to the bit what low_latency_dispatch returns, with a handle for every combine.

    Collective: every rank of the group calls it, inside jax.shard_map over the group's mesh.
    Gradient: none: jax.grad raises ConfigError, and so does jax.vmap.
    Raises: ConfigError, GroupError while tracing; PeerTimeoutError and GroupError from
      `group.check()`, also if the exchange is not in flight.
    Source: DeepEP (DeepSeek, 2025), the receive hooks of its low-latency kernels.
    """
    check = _check_recv
    spec = replace(halves.require_in_flight(check, in_flight, DispatchSpec), op=check.op)
    group = check.group(registry.find_group(spec.group.identity, op=check.op))
    tokens: call_halves.Tokens = in_flight.operands
    waits_for = halves.leaves_of(check, after, name="after")
    operands = vary_alike((in_flight.number, tokens, waits_for), group)
    routed = halves.without_gradient(spec.op, partial(call_halves.dispatch_recv, spec), *operands)
    return assemble_low_latency(spec, tokens.topk_idx, routed, has_scales=in_flight.has_scales)
