"""One decoding step of tensor-parallel layers: psum and a norm, or the two in one kernel.

    python benchmarks/decode_layer.py --batch 1 8 64 --out benchmarks/results

A layer is the attention's output projection and the MLP of a 70-billion-parameter model (hidden
8,192, intermediate 28,672), each followed by a sum over the ranks, the residual and an RMSNorm.
"""

import argparse
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_ep
from jax_ep.bench.record import append_brief_records, brief_record
from jax_ep.bench.reduce import psum_and_norm
from jax_ep.bench.timing import percentiles, seconds_of, take_turns
from jax_ep.testing.ranks import make_mesh, on_ranks, place

HIDDEN, INTERMEDIATE = 8192, 28672
LAYERS = 8  # of one program, with the same weights; they are larger than any cache
RUNS = 51

Norm = Callable[[Any, Any, Any], tuple[Any, Any]]


def no_sum(x: Any, residual: Any, scale: Any) -> tuple[Any, Any]:
    """The rest of the layer: neither a sum nor a norm."""
    return x * scale[None], residual + x


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
        norms: dict[str, tuple[str, Norm]] = {
            "psum": ("xla", partial(psum_and_norm, axes="tp")),
            "jax_ep": (group.backend, fused),
            "no_sum": ("xla", no_sum),
        }
        for batch in args.batch:
            rows = np.full((num_ranks, batch, HIDDEN), 0.5, jnp.bfloat16)
            own = place((rows, rows, np.ones((num_ranks, HIDDEN), jnp.bfloat16)), mesh)
            runs = []
            for _, norm in norms.values():
                program = on_ranks(partial(layers, norm), mesh, check_vma=False)
                runs.append(partial(seconds_of, program, *own, weights))
                runs[-1]()  # compiles
            taken = take_turns(runs, repeats=RUNS) / LAYERS * 1e6
            us = {name: percentiles(t) for name, t in zip(norms, taken, strict=True)}
            medians = ", ".join(f"{name} {own['p50']:.1f} us" for name, own in us.items())
            print(f"batch {batch}: {medians} a layer", flush=True)
            run = uuid.uuid4().hex
            records += [
                brief_record(
                    "decode_layer",
                    name,
                    backend,
                    us[name],
                    run,
                    num_ranks=num_ranks,
                    batch=batch,
                    hidden=HIDDEN,
                    intermediate=INTERMEDIATE,
                    dtype="bf16",
                )
                for name, (backend, _) in norms.items()
            ]
    append_brief_records(args.out, "decode_layer", records, args.commit)


if __name__ == "__main__":
    main()
