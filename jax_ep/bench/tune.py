"""`python -m jax_ep tune` measures which algorithm is fastest, and writes a table."""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax

import jax_ep
from jax_ep.bench import reduce, report
from jax_ep.bench.record import Record, find_place
from jax_ep.bench.session import Session, save
from jax_ep.bench.shapes import make_reduce_point
from jax_ep.errors import GroupError
from jax_ep.testing.ranks import make_mesh

# Microseconds by operation, bytes of a rank and algorithm.
Medians = dict[str, dict[int, dict[str, float]]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `tune`."""
    add = parser.add_argument
    add("--out", type=Path, required=True, help="table to write; entries of others are kept")
    add("--records", type=Path, default=Path("benchmarks/results"), help="folder of the records")
    add("--most-mib", type=int, default=64, help="largest size; beyond it the last choice holds")
    add("--ranks", type=int, help="use the first of jax.devices(); default: all")
    add("--plot", action="store_true", help="draw time over bytes; needs matplotlib")
    # Of chains of half a millisecond, which the host disturbs: compiling takes longer than many.
    add("--repeats", type=int, default=51)
    add("--commit", help="what to record in place of what git says here")


def main(args: argparse.Namespace) -> None:
    """Measures, and process 0 writes."""
    mesh = make_mesh(args.ranks or len(jax.devices()))
    place = find_place(args.commit)
    sizes = [1 << shift for shift in range(10, (args.most_mib << 20).bit_length(), 2)]
    with jax_ep.Group.open(mesh, "ep", name="tune", timeout=60.0) as group:
        if group.backend != "cuda":
            raise GroupError(f"tune: there is nothing to choose on back end {group.backend!r}")
        if group.spec.staging_bytes is not None:
            raise GroupError(f"tune: not where operands are staged: {group.info().staging}")
        session = Session(group, place, repeats=args.repeats, backends=["cuda"])
        rows = measure(session, sizes, args.repeats)
        group.check()
    if jax.process_index() > 0:
        return
    records = [row.record for row in rows]
    found = collect(records)
    entry = {
        **asdict(place),
        "device": mesh.devices.flat[0].device_kind,
        "num_ranks": mesh.devices.size,
        "ops": {op: _steps(found[op]) for op in reduce.OPS},
        "measured": found,
    }
    print(report.format_table(rows))
    _write(args.out, entry)
    print(f"the table of {entry['device']}, {entry['num_ranks']} ranks: {args.out}")
    save(records, reduce.OPS, place, args.records, plot=args.plot)


def measure(session: Session, sizes: Sequence[int], repeats: int) -> list[report.Row]:
    """All operations at all sizes that hold a row."""
    found = (
        make_reduce_point(op, size, dtype="bf16", hidden=reduce.HIDDEN)
        for op in reduce.OPS
        for size in sizes
    )
    points = [point for point in found if point is not None]
    with report.Progress(len(points) * repeats) as progress:
        return [row for p in points for row in session.measure(p.op, p, progress)]


def collect(records: Sequence[Record]) -> Medians:
    """Their medians, by the names that the table has; the stock collective is psum there."""
    found: Medians = {}
    for r in records:
        name = r.algorithm if r.contender == "jax_ep" and r.algorithm else reduce.PSUM
        sizes = found.setdefault(r.op, {})
        sizes.setdefault(r.num_bytes, {})[name] = round(r.us["p50"], 2)
    return found


def _steps(found: Mapping[int, Mapping[str, float]]) -> list[list[Any]]:
    """Each algorithm up to the largest size at which it is the fastest of all, in a row."""
    steps: list[list[Any]] = []
    for num_bytes, us in sorted(found.items()):
        best = min(us, key=lambda name: us[name])
        if steps and steps[-1][1] == best:
            steps[-1][0] = num_bytes
        else:
            steps.append([num_bytes, best])
    steps[-1][0] = None
    return steps


def _write(path: Path, entry: Mapping[str, Any]) -> None:
    tables = json.loads(path.read_text())["tables"] if path.exists() else []
    own = (entry["device"], entry["num_ranks"])
    kept = [t for t in tables if (t["device"], t["num_ranks"]) != own]
    path.write_text(json.dumps({"tables": [*kept, entry]}, indent=1) + "\n")
