"""A low-latency dispatch and a shared expert, with a late peer: in turn, and between the halves.

    python benchmarks/halves.py --tokens 1 32 128 --delay-us 0 20 50 --out benchmarks/results
    python benchmarks/halves.py --tokens 4 --hidden 128 --width 64 --experts 8 --topk 2 --steps 60

Rank 0 is late before each step. The others wait for its tokens: in a whole dispatch before the
matmul begins, with halves behind it. What is hidden is the part of the delay by which a step of the
others is not longer than a step without a delay.
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
from jax_ep.testing.ranks import make_mesh, on_ranks, place


def make_links(group: jax_ep.Group, sizes: argparse.Namespace, num_tokens: int) -> dict[str, Link]:
    """The ways to compute both, and each alone."""
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

    def dispatch(given: Any, _: Any) -> Any:
        return jax_ep.low_latency_dispatch(*given[:2], **exchange).x

    def matmul(given: Any, _: Any) -> Any:
        return given[0] @ given[2]

    def in_turn(given: Any, last: Any) -> Any:
        return dispatch(given, last), matmul(given, last)

    def halves(given: Any, _: Any) -> Any:
        x, ids, w = given
        sent = jax_ep.low_latency_dispatch_send(x, ids, through=x, **exchange)
        shared = sent.through @ w
        return jax_ep.low_latency_dispatch_recv(sent, after=shared).x, shared

    def link(run: Any) -> Link:
        shape = on_ranks(lambda *own: run(own, None), group.mesh)
        made = jax.tree.map(
            lambda a: place(np.zeros(a.shape, a.dtype), group.mesh, group.axes),
            jax.eval_shape(shape, *given),
        )
        return Link(run, Carry(given, made))

    ways = {"dispatch": dispatch, "matmul": matmul, "in_turn": in_turn, "halves": halves}
    return {name: link(run) for name, run in ways.items()}


def hidden_us(steps: Steps) -> float:
    """Returns the microseconds of the delay that do not lengthen a step of the others."""
    assert steps.delay_us is not None
    assert steps.delayed_us is not None
    return steps.delay_us - (steps.delayed_us["p50"] - steps.us["p50"])


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
    add("--delay-us", nargs="+", type=int, default=[50], help="by which rank 0 is late")
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
            links = make_links(group, args, num_tokens)
            found = measure(
                list(links.values()), group, num_steps=args.steps, delay_us=delay_us or None
            )
            run = uuid.uuid4().hex
            print(f"{num_tokens} tokens, rank 0 late by {delay_us} us:")
            for name, steps in zip(links, found, strict=True):
                line = f"  {name:9}{steps.us['p50']:9.1f} us"
                if steps.delayed_us is not None:
                    line += f", late peer {steps.delayed_us['p50']:9.1f} us"
                    line += f", hidden {hidden_us(steps):7.1f} us" if name != "matmul" else ""
                print(line, flush=True)
                records.append(
                    brief_record(
                        "halves",
                        name,
                        "xla" if name == "matmul" else group.backend,
                        steps.us,
                        run,
                        num_ranks=num_ranks,
                        tokens=num_tokens,
                        hidden=args.hidden,
                        topk=args.topk,
                        experts=args.experts,
                        width=args.width,
                        layout=args.layout,
                        dtype="bf16",
                        delay_us=steps.delay_us,
                        delayed_us=steps.delayed_us,
                    )
                    | {"timing": "device"}
                )
        group.check()
    if args.out is not None:
        append_brief_records(args.out, "halves", records, args.commit)


if __name__ == "__main__":
    main()
