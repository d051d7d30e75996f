"""A dispatch and a matmul that do not need each other: in turn, and beside each other.

    python benchmarks/overlap.py --width 4096 16384 --sms 16 20 24 --out benchmarks/results

What cannot be beaten is the longer of the two. Command buffers are off: inside one, XLA runs
everything in turn.
"""

import argparse
import itertools
import os
import statistics
import time
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
from jax_ep.bench.record import append_records
from jax_ep.bench.shapes import SHAPES, make_inputs, make_point
from jax_ep.testing.ranks import make_mesh, on_ranks, place

STEPS = 16  # of one program
RUNS = 9


def matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    """What a shared expert begins with."""
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
    make: Callable[..., list[jax.Array]], mesh: Any, operands: tuple[Any, ...]
) -> float:
    """Of one step, the median of several runs."""
    program = on_ranks(partial(chain, make), mesh, check_vma=False)
    jax.block_until_ready(program(*operands))
    taken = []
    for _ in range(RUNS):
        begin = time.perf_counter()
        jax.block_until_ready(program(*operands))
        taken.append((time.perf_counter() - begin) / STEPS * 1e6)
    return statistics.median(taken)


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
                "beside": lambda x, ids, a, w: [send(x, ids), jax_ep.beside(matmul)(a, w)],
            }
            us = {name: microseconds(make, mesh, operands) for name, make in ways.items()}
            longer = max(us["dispatch"], us["matmul"])
            print(
                f"width {width}, {sms} SMs: "
                + ", ".join(f"{name} {t:.0f} us" for name, t in us.items())
                + f"; beside over the longer {us['beside'] / longer:.2f}",
                flush=True,
            )
            records.append({"op": "overlap", "sms": sms, "us": us, "width": width})
    shared = {
        "shape": args.shape,
        "num_ranks": num_ranks,
        "tokens": point.num_tokens,
        "hidden": point.hidden,
        "dtype": "bf16",
        "layout": "rank",
        "timing": "chain",
    }
    append_records(args.out, "overlap", records, shared, args.commit)


if __name__ == "__main__":
    main()
