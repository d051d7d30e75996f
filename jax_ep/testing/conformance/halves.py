"""Checks of exchanges that are sent and received apart, against the reference, to the bit."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_ep
from jax_ep.testing import routing as routings
from jax_ep.testing.cases import Case, assert_combined, assert_dispatched, make_data
from jax_ep.testing.compare import assert_same_bits
from jax_ep.testing.conformance.check import Check, noted
from jax_ep.testing.conformance.sizes import seed_of
from jax_ep.testing.ranks import on_group, on_ranks

_OPS = frozenset(
    f"low_latency_{exchange}{half}"
    for exchange in ("dispatch", "combine")
    for half in ("", "_send", "_recv")
)


def _options(case: Case, group: jax_ep.Group, backend: str) -> dict[str, Any]:
    return {
        "group": group,
        "num_experts": case.num_experts,
        "max_tokens_per_rank": case.num_tokens,
        "layout": case.layout,
        "backend": backend,
    }


def halves_of_two_batches(
    group: jax_ep.Group, backend: str, *, wire: str | None = None, **params: Any
) -> None:
    """Compares two batches of tokens that take turns, each with one exchange in flight."""
    case = Case(num_ranks=group.num_ranks, fill="padding", **params)
    options = _options(case, group, backend)

    def run(*batches: Any) -> Any:
        sent = [
            jax_ep.low_latency_dispatch_send(x, ids, weights, through=rows, **options)
            for x, ids, weights, rows, _ in batches
        ]
        outs: list[Any] = [None, None]
        back: list[Any] = [None, None]
        for i in (1, 0):  # not in the order of the sends
            outs[i] = jax_ep.low_latency_dispatch_recv(sent[i])
            weights = {None: None, "rows": outs[i].weights}[case.weights_at]
            back[i] = jax_ep.low_latency_combine_send(
                sent[i].through, outs[i].handle, weights=weights, wire=wire, backend=backend
            )
        sums = [
            jax_ep.low_latency_combine_recv(b, bias=biases)
            for b, (*_, biases) in zip(back, batches, strict=True)
        ]
        return tuple(outs), tuple(sums)

    fn = on_group(run, group)
    names = list(routings.BY_NAME)
    for first, second in zip(names, names[1:] + names[:1], strict=True):
        with noted(f"routings {first} and {second}, {case}"):
            data = [make_data(case, name, seed_of(name)) for name in (first, second)]
            outs, sums = fn(*(d.operands() for d in data))
            for own, out, y in zip(data, outs, sums, strict=True):
                assert_combined(case, own, assert_dispatched(case, own, out), y, wire=wire)


def halves_in_a_scan(group: jax_ep.Group, backend: str, *, num_steps: int, **params: Any) -> None:
    """Compares a loop whose dispatch is sent one step ahead with one of whole exchanges."""
    case = Case(num_ranks=group.num_ranks, fill="padding", **params)
    options = _options(case, group, backend)

    def experts(out: jax_ep.Dispatched) -> jax.Array:
        return jnp.where(out.handle.recv_src[:, None] >= 0, out.x * 2, 0)

    def whole(xs: Any, ids: Any) -> Any:
        def step(carry: Any, own: Any) -> Any:
            out = jax_ep.low_latency_dispatch(*own, **options)
            return carry, jax_ep.low_latency_combine(experts(out), out.handle, backend=backend)

        return jax.lax.scan(step, None, (xs, ids))[1]

    def halved(xs: Any, ids: Any) -> Any:
        def send(own: Any, after: Any = ()) -> jax_ep.InFlight:
            x, ids = own
            return jax_ep.low_latency_dispatch_send(x, ids, after=after, **options)

        def finish(sent: jax_ep.InFlight) -> Any:
            out = jax_ep.low_latency_dispatch_recv(sent)
            back = jax_ep.low_latency_combine_send(experts(out), out.handle, backend=backend)
            return back, jax_ep.low_latency_combine_recv

        def step(sent: jax_ep.InFlight, own: Any) -> Any:
            back, receive = finish(sent)  # frees the place of the dispatch that comes next
            following = send(own, after=back.number)
            return following, receive(back, after=following.number)

        last, sums = jax.lax.scan(step, send((xs[0], ids[0])), (xs[1:], ids[1:]))
        back, receive = finish(last)
        return jnp.concatenate([sums, receive(back)[None]])

    steps = [make_data(case, name, 7 + i) for i, name in enumerate([*routings.BY_NAME][:num_steps])]
    xs = np.stack([d.x for d in steps], axis=1)
    ids = np.stack([d.topk_idx for d in steps], axis=1)
    compare = on_ranks(_count_different, group.mesh, axes=group.axes)
    # A process has only its own ranks' sums, so the ranks compare them.
    different = compare(on_group(halved, group)(xs, ids), on_group(whole, group)(xs, ids))
    assert_same_bits(different, np.zeros(group.num_ranks, np.int32), what="different sums")


def _count_different(a: jax.Array, b: jax.Array) -> jax.Array:
    """Counts the elements of one rank whose bits differ."""
    words = jnp.uint16 if a.dtype.itemsize == 2 else jnp.uint32
    bits_a, bits_b = (jax.lax.bitcast_convert_type(x, words) for x in (a, b))
    return jnp.sum(bits_a != bits_b, dtype=jnp.int32)


def _checks() -> Iterator[Check]:
    def check(run: Any, **params: Any) -> Check:
        return Check(run, _OPS, params)

    yield check(
        halves_of_two_batches,
        layout="expert",
        num_tokens=7,
        num_topk=5,
        experts_per_rank=8,
        hidden=1536 + 8,
        num_biases=1,
        weights_at="rows",
    )
    yield check(
        halves_of_two_batches,
        layout="rank",
        num_tokens=33,
        experts_per_rank=8,
        hidden=384,
        dtype="f32",
        num_biases=2,
        wire="fp8",
    )
    yield check(halves_in_a_scan, layout="expert", num_steps=3, num_tokens=5)


CHECKS = tuple(_checks())
FULL = CHECKS
