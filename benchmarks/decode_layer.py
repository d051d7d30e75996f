"""One decoding step of tensor-parallel layers: psum and a norm, or the two in one kernel.

    python benchmarks/decode_layer.py --batch 1 8 64 --out benchmarks/results

A layer is the attention's output projection and the MLP of a 70-billion-parameter model (hidden
8,192, intermediate 28,672), each followed by a sum over the ranks, the residual and an RMSNorm.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_ep
from jax_ep.bench.record import append_records
from jax_ep.testing.ranks import make_mesh, on_ranks, place

HIDDEN, INTERMEDIATE = 8192, 28672
LAYERS = 8  # of one program, with the same weights; they are larger than any cache
RUNS = 15

Norm = Callable[[Any, Any, Any], tuple[Any, Any]]


def psum_and_norm(x: Any, residual: Any, scale: Any) -> tuple[Any, Any]:
    """What is written by hand in stock JAX."""
    residual = jax.lax.psum(x, "tp") + residual
    wide = residual.astype(jnp.float32)
    factor = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + 1e-6)
    return (wide * factor * scale.astype(jnp.float32)).astype(x.dtype), residual


def no_sum(x: Any, residual: Any, scale: Any) -> tuple[Any, Any]:
    """What the rest of the layer takes: neither a sum nor a norm."""
    return x * scale, residual + x


def layers(norm: Norm, x: Any, residual: Any, scale: Any, weights: tuple[Any, ...]) -> Any:
    """LAYERS steps, each after the one before."""
    out, gate_up, down = weights
    for _ in range(LAYERS):
        heads = x[:, : out.shape[0]]
        x, residual = norm(heads @ out, residual, scale)
        gate, up = jnp.split(x @ gate_up, 2, axis=-1)
        x, residual = norm((jax.nn.silu(gate) * up) @ down, residual, scale)
    return x


def main() -> None:
    """Measures, prints, writes the records."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8, 64])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--commit", help="what to record in place of what git says here")
    args = parser.parse_args()
    mesh = make_mesh(len(jax.devices()), "tp")
    num_ranks = mesh.devices.size
    sizes = [
        (HIDDEN // num_ranks, HIDDEN),
        (HIDDEN, 2 * INTERMEDIATE // num_ranks),
        (INTERMEDIATE // num_ranks, HIDDEN),
    ]
    make = jax.jit(
        lambda: tuple(jnp.full((num_ranks, *size), 1e-3, jnp.bfloat16) for size in sizes),
        out_shardings=jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("tp")),
    )
    weights = make()
    records = []
    with jax_ep.Group.open(mesh, "tp", name="decode", timeout=60.0) as group:
        fused = partial(jax_ep.all_reduce_residual_rmsnorm, group=group)
        norms: dict[str, Norm] = {"psum": psum_and_norm, "fused": fused, "no_sum": no_sum}
        for batch in args.batch:
            rows = np.full((num_ranks, batch, HIDDEN), 0.5, jnp.bfloat16)
            own = place((rows, rows, np.ones((num_ranks, HIDDEN), jnp.bfloat16)), mesh)
            programs = {
                name: on_ranks(partial(layers, norm), mesh, check_vma=False)
                for name, norm in norms.items()
            }
            taken: dict[str, list[float]] = {name: [] for name in programs}
            for run in range(RUNS + 1):
                for name, program in programs.items():
                    begin = time.perf_counter()
                    jax.block_until_ready(program(*own, weights))
                    if run > 0:  # the first compiles
                        taken[name].append((time.perf_counter() - begin) / LAYERS * 1e6)
            us = {name: statistics.median(times) for name, times in taken.items()}
            print(
                f"batch {batch}: "
                + ", ".join(f"{name} {t:.1f} us" for name, t in us.items())
                + " a layer",
                flush=True,
            )
            records.append({"op": "decode_layer", "batch": batch, "us": us})
    shared = {
        "hidden": HIDDEN,
        "intermediate": INTERMEDIATE,
        "num_ranks": num_ranks,
        "dtype": "bf16",
    }
    append_records(args.out, "decode_layer", records, shared, args.commit)


if __name__ == "__main__":
    main()
