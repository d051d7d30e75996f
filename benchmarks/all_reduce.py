"""all_reduce and its relatives beside psum, in jitted chains of 100.

    python benchmarks/all_reduce.py --out benchmarks/results
    XLA_FLAGS=--xla_gpu_experimental_use_collective_kernels= python benchmarks/all_reduce.py

The second line compares with psum by NCCL: by default XLA carries small sums by kernels of its own.
"""

import argparse
from pathlib import Path

import jax

import jax_ep
from jax_ep.bench import reduce
from jax_ep.bench.record import append_records
from jax_ep.testing.ranks import make_mesh

NVLINK_GB_S = 330.0  # one direction, of two H100 (jax_ep/bench/floor.py)


def main() -> None:
    """Measures, prints, writes the records."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ops", nargs="*", choices=[*reduce.OPS, []], help="default: all")
    parser.add_argument("--kib", nargs="+", type=float, default=[4.0**i for i in range(9)])
    parser.add_argument("--algorithms", nargs="+", help="default: all that can carry the size")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--commit", help="what to record in place of what git says here")
    args = parser.parse_args()
    mesh = make_mesh(len(jax.devices()))
    shared = {
        "num_ranks": mesh.devices.size,
        "num_processes": jax.process_count(),
        "dtype": "bf16",
    }
    records = []
    with jax_ep.Group.open(mesh, "ep", name="reduce", timeout=60.0) as group:
        for op in args.ops or reduce.OPS:
            for kib in args.kib:
                num_bytes = int(kib * 1024)
                steps = reduce.STEPS if num_bytes <= 4 << 20 else reduce.STEPS // 4
                found = reduce.measure(
                    group,
                    op,
                    num_bytes,
                    algorithms=args.algorithms,
                    repeats=args.repeats,
                    steps=steps,
                )
                wire_us = num_bytes * (group.num_ranks - 1) / NVLINK_GB_S / 1e3
                line = ", ".join(f"{m.algorithm} {m.us:.1f}" for m in found)
                print(f"{op} {kib:g} KiB: {line}; wire {wire_us:.1f} us", flush=True)
                records.append(
                    {
                        "op": op,
                        "bytes": num_bytes,
                        "us": {m.algorithm: m.us for m in found},
                        "empty_us": found[0].empty,
                        "wire_us": wire_us,
                        "steps": steps,
                    }
                )
    append_records(args.out, "all_reduce", records, shared, args.commit)


if __name__ == "__main__":
    main()
