"""Costs of a call on the host where no command buffer replays it.

    python benchmarks/host_time.py --out benchmarks/results

JAX returns from a program when the host has enqueued all of it. So two programs that differ by
their number of calls tell what one call costs the host: its handler, and what XLA does around it.
Command buffers are off: a replayed call costs the host nothing.
"""

import argparse
import os
import time
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
from jax_ep.bench.timing import percentiles, take_turns
from jax_ep.testing.ranks import make_mesh, on_ranks, place

TOKENS, HIDDEN, TOPK, EXPERTS_PER_RANK = 64, 512, 8, 8
FEW, MANY = 20, 120  # calls of a program; each is at most two kernels, and 1,024 fit in a queue
RUNS = 21


def microseconds_of_a_call(group: jax_ep.Group, op: str) -> dict[str, dict[str, float]]:
    """Until the host has enqueued it, and until it is done."""
    num_experts = group.num_ranks * EXPERTS_PER_RANK

    def send(x: jax.Array, ids: jax.Array) -> jax_ep.Dispatched:
        # As much room as tokens: each result is the next call's operand, with nothing in between.
        return jax_ep.dispatch(
            x, ids, group=group, num_experts=num_experts, recv_capacity=TOKENS, fill="none"
        )

    def chain(count: int) -> Callable[..., jax.Array]:
        def run(x: jax.Array, ids: jax.Array) -> jax.Array:
            handle = send(x, ids).handle
            for _ in range(count):
                x = send(x, ids).x if op == "dispatch" else jax_ep.combine(x, handle)
            return x[0, 0]

        return on_ranks(run, group.mesh, check_vma=False)

    rng = np.random.default_rng(0)
    num_ranks = group.num_ranks
    x = np.ones((num_ranks, TOKENS, HIDDEN), jnp.bfloat16)
    ids = rng.integers(0, num_experts, (num_ranks, TOKENS, TOPK), dtype=np.int32)
    operands = place((x, ids), group.mesh)
    runs = [partial(seconds, chain(count), operands) for count in (FEW, MANY)]
    for run in runs:
        run()  # compiles
    few, many = take_turns(runs, repeats=RUNS)
    enqueued, done = (many - few).T / (MANY - FEW) * 1e6
    return {"enqueued": percentiles(enqueued), "done": percentiles(done)}


def seconds(program: Callable[..., jax.Array], operands: Any) -> tuple[float, float]:
    """Seconds of one run, until the host has enqueued it, and until it is done."""
    begin = time.perf_counter()
    result = program(*operands)
    enqueued = time.perf_counter()
    jax.block_until_ready(result)
    return enqueued - begin, time.perf_counter() - begin


def main() -> None:
    """Measures, prints, writes the records."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--commit", help="what to record in place of what git says here")
    args = parser.parse_args()
    records = []
    for num_ranks in sorted({1, len(jax.devices())}):
        with jax_ep.Group.open(make_mesh(num_ranks), "ep", name="host", timeout=60.0) as group:
            for op in ("dispatch", "combine"):
                us = microseconds_of_a_call(group, op)
                medians = ", ".join(f"{until} {own['p50']:.1f} us" for until, own in us.items())
                print(f"{op}, {num_ranks} ranks: {medians}")
                run = uuid.uuid4().hex
                records += [
                    brief_record(
                        "host_time",
                        "jax_ep",
                        group.backend,
                        own,
                        run,
                        of=op,
                        until=until,
                        num_ranks=num_ranks,
                        tokens=TOKENS,
                        hidden=HIDDEN,
                        topk=TOPK,
                        dtype="bf16",
                    )
                    for until, own in us.items()
                ]
    append_brief_records(args.out, "host_time", records, args.commit)


if __name__ == "__main__":
    main()
