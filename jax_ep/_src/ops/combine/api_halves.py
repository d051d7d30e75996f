"""low_latency_combine_send and low_latency_combine_recv: a low-latency combine in two halves."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax

from jax_ep._src.base import registry
from jax_ep._src.base.handle import DispatchHandle, InFlight
from jax_ep._src.base.options import BackendName, ExchangeMode, WireName
from jax_ep._src.base.spec import RouteSpec
from jax_ep._src.ops.combine import call_halves
from jax_ep._src.ops.combine.api import as_biases, prepare_combine, to_rows
from jax_ep._src.ops.combine.api_low_latency import format_of
from jax_ep._src.ops.common import halves
from jax_ep._src.ops.common.checks import Checks
from jax_ep._src.ops.common.few_tokens import require_combine_halves
from jax_ep._src.ops.common.vary import vary_alike

_check_send = Checks("low_latency_combine_send")
_check_recv = Checks("low_latency_combine_recv")


def low_latency_combine_send(
    rows: jax.Array,
    handle: DispatchHandle,
    *,
    weights: jax.Array | None = None,
    wire: WireName | None = None,
    num_sms: int | None = None,
    backend: BackendName | None = None,
    after: Any = (),
    through: Any = None,
) -> InFlight:
    """Sends what a low_latency_combine adds up for other ranks, and waits for nobody.

    `low_latency_dispatch_send` says what orders the halves, and how many exchanges may be in
    flight.

    Args:
      rows: as in low_latency_combine, as are all arguments down to backend.
      handle: handle of a dispatch, which was received if it was sent apart.
      weights: as in low_latency_combine. Weights at the tokens are moved to the rows before, by a
        call that waits for the peers.
      wire: None or "fp8". Static.
      num_sms: SMs that each half uses on the `cuda` back end. Static.
      backend: "cpu", "cuda" or "xla"; None: the group's.
      after: as in low_latency_dispatch_send.
      through: as in low_latency_dispatch_send.

    Returns:
      InFlight, which low_latency_combine_recv takes. It holds rows, weights and the arrays of the
      handle, which the receive reads.

    Collective: every rank of the group calls it, inside jax.shard_map over the group's mesh.
    Gradient: none: jax.grad raises ConfigError, and so does jax.vmap.
    Limits: as low_latency_combine, with `in_flight_bytes` of `Group.open`, which is 0 by default.
    Raises: ShapeError, DTypeError, ConfigError, GroupError while tracing; GroupError from
      `group.check()`.
    Source: DeepEP (DeepSeek, 2025), the receive hooks of its low-latency kernels.
    """
    check = _check_send
    spec, rows, weights, _, index, group = prepare_combine(
        check,
        rows,
        weights,
        handle,
        bias=None,
        num_sms=num_sms,
        backend=backend,
        mode=ExchangeMode.LOW_LATENCY,
        wire=format_of(check, wire),
    )
    require_combine_halves(spec, index, rows)
    waits_for = halves.leaves_of(check, after, name="after")
    passed = halves.leaves_of(check, through, name="through")
    operands = vary_alike((index, rows, weights, waits_for, passed), group)
    index, rows, weights, waits_for, passed = operands
    sums = call_halves.Sums(index, rows, to_rows(spec, weights, index))
    number, passed = halves.without_gradient(
        spec.op, partial(call_halves.combine_send, spec), sums, waits_for, passed
    )
    return InFlight(
        number=number,
        through=jax.tree.unflatten(jax.tree.structure(through), passed),
        operands=sums,
        spec=spec,
    )


def low_latency_combine_recv(
    in_flight: InFlight,
    *,
    bias: jax.Array | Sequence[jax.Array] | None = None,
    after: Any = (),
) -> jax.Array:
    """Receives the sums that low_latency_combine_send has sent, on all ranks.

    Args:
      in_flight: the result of the send. It is received once.
      bias: one or two arrays [num_tokens, hidden] of the rows' dtype, added to the result. The
        receive waits for them, so the shared expert's result hides the wait for the peers.
      after: as in low_latency_dispatch_recv.

    Returns:
      [num_tokens, hidden] of the rows' dtype: to the bit what low_latency_combine returns.

    Collective: every rank of the group calls it, inside jax.shard_map over the group's mesh.
    Gradient: none: jax.grad raises ConfigError, and so does jax.vmap.
    Raises: ShapeError, DTypeError, ConfigError, GroupError while tracing; PeerTimeoutError and
      GroupError from `group.check()`, also if the exchange is not in flight.
    Source: DeepEP (DeepSeek, 2025), the receive hooks of its low-latency kernels.
    """
    check = _check_recv
    spec = replace(halves.require_in_flight(check, in_flight, RouteSpec), op=check.op)
    group = check.group(registry.find_group(spec.group.identity, op=check.op))
    sums: call_halves.Sums = in_flight.operands
    biases = as_biases(check, bias, sums.rows, sums.places.send_row.shape[0])
    waits_for = halves.leaves_of(check, after, name="after")
    operands = vary_alike((in_flight.number, sums, biases, waits_for), group)
    y: jax.Array = halves.without_gradient(
        spec.op, partial(call_halves.combine_recv, spec), *operands
    )
    return y
