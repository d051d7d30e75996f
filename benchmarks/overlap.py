"""A dispatch and a matmul that do not need each other: in turn, and beside each other.

    python benchmarks/overlap.py --width 4096 16384 --sms 16 20 24 --out benchmarks/results

What cannot be beaten is the longer of the two. Command buffers are off: inside one, XLA runs
everything in turn.
"""

import argparse
import itertools
import os
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

if "xla_gpu_enable_command_buffer" not in os.environ.get("XLA_FLAGS", ""):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_enable_command_buffer="
    os.environ["XLA_FLAGS"] = flags.strip()

import jax
import jax.numpy as jnp
import numpy as np

import jax_ep
from jax_ep.bench.record import append_brief_records, brief_record
from jax_ep.bench.shapes import SHAPES, make_inputs, make_point
from jax_ep.bench.timing import percentiles, seconds_of, take_turns
from jax_ep.testing.ranks import make_mesh, on_ranks, place

STEPS = 16  # of one program
RUNS = 9


def matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    """The first matmul of a shared expert."""
    return x @ w


def chain(make: Callable[..., list[jax.Array]], *own: Any) -> jax.Array:
    """STEPS steps, each after the one before: a zero made of its results enters the operands."""
    x, ids, a, w = own
    zero = jnp.int32(0)
    for _ in range(STEPS):
        a = a.at[0, 0].add(zero.astype(a.dtype))  # in place, but for the first
        made = make(x, ids + zero, a, w)
        zero = sum((jnp.isnan(m[0, 0]).astype(jnp.int32) for m in made), jnp.int32(0))
    return zero[None]


def microseconds(
    ways: dict[str, Callable[..., list[jax.Array]]], mesh: Any, operands: tuple[Any, ...]
) -> dict[str, dict[str, float]]:
    """Microseconds of one step, each way in its turn."""
    runs = []
    for make in ways.values():
        program = on_ranks(partial(chain, make), mesh, check_vma=False)
        runs.append(partial(seconds_of, program, *operands))
        runs[-1]()  # compiles
    taken = take_turns(runs, repeats=RUNS) / STEPS * 1e6
    return {name: percentiles(t) for name, t in zip(ways, taken, strict=True)}


def main() -> None:
    """Measures, prints, writes the records."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="deepseek-v3")
    parser.add_argument("--width", nargs="+", type=int, default=[4096, 16384], help="of the matmul")
    parser.add_argument("--sms", nargs="+", type=int, default=[16, 20, 24])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--commit", help="what to record in place of what git says here")
    args = parser.parse_args()

    mesh = make_mesh(len(jax.devices()))
    num_ranks = mesh.devices.size
    point = make_point(
        args.shape,
        SHAPES[args.shape],
        dtype="bf16",
        layout="rank",
        num_ranks=num_ranks,
        balance=None,
        fill="none",
    )
    x, ids, _ = make_inputs(point, mesh)
    records = []
    with jax_ep.Group.open(mesh, "ep", name="overlap", timeout=60.0) as group:
        for width, sms in itertools.product(args.width, args.sms):
            w = np.full((num_ranks, point.hidden, width), 1e-3, jnp.bfloat16)
            operands = (x, ids, jnp.copy(x), *place((w,), mesh))

            def send(x: Any, ids: Any, sms: int = sms) -> jax.Array:
                return jax_ep.dispatch(
                    x, ids, group=group, num_experts=point.num_experts, fill="none", num_sms=sms
                ).x

            ways: dict[str, Callable[..., list[jax.Array]]] = {
                "dispatch": lambda x, ids, a, w: [send(x, ids)],
                "matmul": lambda x, ids, a, w: [matmul(a, w)],
                "in_turn": lambda x, ids, a, w: [send(x, ids), matmul(a, w)],
                "beside": lambda x, ids, a, w: [send(x, ids), jax_ep.overlap(matmul)(a, w)],
            }
            us = microseconds(ways, mesh, operands)
            medians = {name: own["p50"] for name, own in us.items()}
            longer = max(medians["dispatch"], medians["matmul"])
            print(
                f"width {width}, {sms} SMs: "
                + ", ".join(f"{name} {t:.0f} us" for name, t in medians.items())
                + f"; beside over the longer {medians['beside'] / longer:.2f}",
                flush=True,
            )
            run = uuid.uuid4().hex
            records += [
                brief_record(
                    "overlap",
                    name,
                    "xla" if name == "matmul" else group.backend,
                    own,
                    run,
                    shape=args.shape,
                    num_ranks=num_ranks,
                    tokens=point.num_tokens,
                    hidden=point.hidden,
                    width=width,
                    dtype="bf16",
                    layout="rank",
                    sms=sms,
                )
                for name, own in us.items()
            ]
    append_brief_records(args.out, "overlap", records, args.commit)


if __name__ == "__main__":
    main()
