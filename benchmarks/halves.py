"""A low-latency dispatch and a shared expert, with late ranks: in turn, and between the halves.

    python benchmarks/halves.py --tokens 1 32 128 --delay-us 0 20 50 --out benchmarks/results
    python benchmarks/halves.py --tokens 4 --hidden 128 --width 64 --experts 8 --topk 2 --steps 60

The ranks are late one after the other, each before one step. The others wait for its tokens: in a
whole dispatch before their matmul begins, with halves behind it. A rank that was in time is ahead
by its matmul then, and can be late by as much in the next step. So up to the smaller of delay and
matmul is hidden in each step. If the same rank were always late, nothing could be: it would have to
do its own matmul in every step.
"""

import argparse
import itertools
import uuid
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_ep
from jax_ep.bench.record import append_brief_records, brief_record
from jax_ep.bench.steps import Link, Steps, measure
from jax_ep.bench.timing import Carry
from jax_ep.testing import virtual_devices
from jax_ep.testing.clock import read_clock
from jax_ep.testing.ranks import make_mesh, on_ranks, place


def make_links(
    group: jax_ep.Group, sizes: argparse.Namespace, num_tokens: int, delay_us: int
) -> dict[str, Link]:
    """The ways to compute both, and each alone. A link is a step for each rank that is late."""
    rng = np.random.default_rng(0)
    num_ranks = group.num_ranks
    scores = rng.random((num_ranks, num_tokens, sizes.experts))
    ids = np.argsort(scores, axis=-1)[..., : sizes.topk].astype(np.int32)
    x = np.full((num_ranks, num_tokens, sizes.hidden), 0.5, jnp.bfloat16)
    w = np.full((num_ranks, sizes.hidden, sizes.width), 1e-3, jnp.bfloat16)
    given = place((x, ids, w), group.mesh, group.axes)
    exchange = {
        "group": group,
        "num_experts": sizes.experts,
        "max_tokens_per_rank": num_tokens,
        "layout": sizes.layout,
    }

    def dispatch(x: jax.Array, ids: jax.Array, w: jax.Array) -> Any:
        return jax_ep.low_latency_dispatch(x, ids, **exchange).x

    def matmul(x: jax.Array, ids: jax.Array, w: jax.Array) -> Any:
        return x @ w

    def in_turn(x: jax.Array, ids: jax.Array, w: jax.Array) -> Any:
        return dispatch(x, ids, w), matmul(x, ids, w)

    def halves(x: jax.Array, ids: jax.Array, w: jax.Array) -> Any:
        sent = jax_ep.low_latency_dispatch_send(x, ids, through=x, **exchange)
        shared = sent.through @ w
        return jax_ep.low_latency_dispatch_recv(sent, after=shared).x, shared

    def link(step: Any) -> Link:
        def run(given: Any, _: Any) -> Any:
            made = ()
            for late in range(num_ranks):
                is_late = jax.lax.axis_index(group.axes) == late
                own_us = jnp.where(is_late, delay_us, 0).astype(jnp.int32)[None]
                given, made = read_clock(own_us, (given, made)).arrays
                made = step(*given)
            return made

        shape = on_ranks(lambda *own: run(own, None), group.mesh)
        made = jax.tree.map(
            lambda a: place(np.zeros(a.shape, a.dtype), group.mesh, group.axes),
            jax.eval_shape(shape, *given),
        )
        return Link(run, Carry(given, made))

    ways = {"dispatch": dispatch, "matmul": matmul, "in_turn": in_turn, "halves": halves}
    return {name: link(run) for name, run in ways.items()}


def step_us(steps: Steps, num_ranks: int) -> dict[str, float]:
    """Returns percentiles of one step out of a link's, less the readings that make ranks late."""
    return {name: (us - num_ranks * steps.clock_us) / num_ranks for name, us in steps.us.items()}


def main() -> None:
    """Measures, prints, writes the records."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--tokens", nargs="+", type=int, default=[1, 32, 128])
    add("--hidden", type=int, default=7168)
    add("--width", type=int, default=4096, help="of the matmul")
    add("--experts", type=int, default=256)
    add("--topk", type=int, default=8)
    add("--layout", choices=("expert", "rank"), default="expert")
    add("--delay-us", nargs="+", type=int, default=[50], help="by which ranks are late")
    add("--steps", type=int, default=2000)
    add("--out", type=Path, help="folder of the records; none: they are only printed")
    add("--commit", help="what to record in place of what git says here")
    args = parser.parse_args()

    virtual_devices(2)
    mesh = make_mesh(len(jax.devices()))
    num_ranks = mesh.devices.size
    room = jax_ep.in_flight_bytes(
        max_tokens_per_rank=max(args.tokens),
        hidden=args.hidden,
        num_topk=args.topk,
        num_ranks=num_ranks,
    )
    records = []
    with jax_ep.Group.open(
        mesh, "ep", name="halves", timeout=60.0, low_latency_bytes=room, in_flight_bytes=room
    ) as group:
        for num_tokens, delay_us in itertools.product(args.tokens, args.delay_us):
            links = make_links(group, args, num_tokens, delay_us)
            found = measure(list(links.values()), group, num_steps=args.steps)
            us = {name: step_us(steps, num_ranks) for name, steps in zip(links, found, strict=True)}
            hidden_us = us["in_turn"]["p50"] - us["halves"]["p50"]
            print(
                f"{num_tokens} tokens, ranks late by {delay_us} us: "
                + ", ".join(f"{name} {own['p50']:.1f} us" for name, own in us.items())
                + f"; hidden {hidden_us:.1f} us",
                flush=True,
            )
            run = uuid.uuid4().hex
            records += [
                brief_record(
                    "halves",
                    name,
                    "xla" if name == "matmul" else group.backend,
                    own,
                    run,
                    num_ranks=num_ranks,
                    tokens=num_tokens,
                    hidden=args.hidden,
                    topk=args.topk,
                    experts=args.experts,
                    width=args.width,
                    layout=args.layout,
                    dtype="bf16",
                    delay_us=delay_us,
                )
                | {"timing": "device"}
                for name, own in us.items()
            ]
        group.check()
    if args.out is not None:
        append_brief_records(args.out, "halves", records, args.commit)


if __name__ == "__main__":
    main()
