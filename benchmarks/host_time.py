"""What a call costs the host where no command buffer replays it.

    python benchmarks/host_time.py --out benchmarks/results

JAX returns from a program when the host has enqueued all of it. So two programs that differ by
their number of calls tell what one call costs the host: its handler, and what XLA does around it.
Command buffers are off: a replayed call costs the host nothing.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

if "xla_gpu_enable_command_buffer" not in os.environ.get("XLA_FLAGS", ""):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_enable_command_buffer="
    os.environ["XLA_FLAGS"] = flags.strip()

import jax
import jax.numpy as jnp
import numpy as np

import jax_ep
from jax_ep.bench.record import append_records
from jax_ep.testing.ranks import make_mesh, on_ranks

TOKENS, HIDDEN, TOPK, EXPERTS_PER_RANK = 64, 512, 8, 8
FEW, MANY = 20, 120  # calls of a program; each is at most two kernels, and 1,024 fit in a queue
RUNS = 21


def microseconds_of_a_call(group: jax_ep.Group, op: str) -> tuple[float, float]:
    """On the host, and until all is done: the medians of several runs."""
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
    medians = {}
    for count in (FEW, MANY):
        program = chain(count)
        operands = jax.block_until_ready(jax.device_put((x, ids)))
        jax.block_until_ready(program(*operands))
        taken = []
        for _ in range(RUNS):
            begin = time.perf_counter()
            result = program(*operands)
            enqueued = time.perf_counter()
            jax.block_until_ready(result)
            taken.append((enqueued - begin, time.perf_counter() - begin))
        medians[count] = [statistics.median(column) for column in zip(*taken, strict=True)]
    host, total = ((m - f) / (MANY - FEW) * 1e6 for f, m in zip(*medians.values(), strict=True))
    return host, total


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
                host, total = microseconds_of_a_call(group, op)
                print(f"{op}, {num_ranks} ranks: host {host:.1f} us, done {total:.1f} us")
                us = {"host": host, "done": total}
                records.append({"op": "host_time", "of": op, "num_ranks": num_ranks, "us": us})
    shared = {"tokens": TOKENS, "hidden": HIDDEN, "topk": TOPK}
    append_records(args.out, "host_time", records, shared, args.commit)


if __name__ == "__main__":
    main()
