"""`python -m jax_ep tune` measures algorithms and SM budgets, and writes a table."""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jax

import jax_ep
from jax_ep._src.base.errors import GroupError
from jax_ep._src.base.tables import EXCHANGES
from jax_ep.bench import reduce, report
from jax_ep.bench.record import Place, Record, find_place
from jax_ep.bench.session import Session, save
from jax_ep.bench.shapes import SHAPES, Point, make_point, make_reduce_point
from jax_ep.testing.ranks import make_mesh

# Microseconds by operation, bytes of a rank and algorithm.
Medians = dict[str, dict[int, dict[str, float]]]
# Microseconds by exchange, layout, and SMs or "xla".
BudgetMedians = dict[str, dict[str, dict[int | str, float]]]

_PARTS = ("sums", "exchanges")
_SMS = (8, 12, 16, 20, 24, 32, 48, 64)
# A smaller budget than the fastest one may take so much longer.
_TOLERANCE = 1.03
# Chains of exchanges last milliseconds: the host disturbs them less than those of sums.
_MOST_TURNS = 21


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `tune`."""
    add = parser.add_argument
    add("--out", type=Path, required=True, help="table to write; entries of others are kept")
    add("--records", type=Path, default=Path("benchmarks/results"), help="folder of the records")
    add(
        "--parts",
        nargs="+",
        choices=_PARTS,
        default=list(_PARTS),
        help="sums: algorithms of the all_reduce family; exchanges: SMs of dispatch and "
        "combine; the table keeps the other part; default: both",
    )
    add("--most-mib", type=int, default=64, help="largest sum; beyond it the last choice holds")
    add("--shape", choices=SHAPES, default="deepseek-v3", help="of the exchanges")
    add("--ranks", type=int, help="use the first of jax.devices(); default: all")
    add("--plot", action="store_true", help="draw time over bytes; needs jax_ep[bench]")
    # Chains take half a millisecond, and the host disturbs them. Many repeats cost less than one
    # compilation.
    add("--repeats", type=int, default=51, help=f"of exchanges {_MOST_TURNS} at most")
    add("--commit", help="what to record in place of what git says here")


def main(args: argparse.Namespace) -> None:
    """Measures, and process 0 writes."""
    mesh = make_mesh(args.ranks or len(jax.devices()))
    place = find_place(args.commit)
    sizes = [1 << shift for shift in range(10, (args.most_mib << 20).bit_length(), 2)]
    found: dict[str, list[report.Row]] = {}
    with jax_ep.Group.open(mesh, "ep", name="tune", timeout=60.0) as group:
        if group.backend != "cuda":
            raise GroupError(f"tune: there is nothing to choose on back end {group.backend!r}")
        if group.spec.staging_bytes is not None:
            raise GroupError(f"tune: not where operands are staged: {group.info().staging}")
        if "sums" in args.parts:
            session = Session(group, place, repeats=args.repeats, backends=["cuda"])
            found["sums"] = measure(session, sizes, args.repeats)
        if "exchanges" in args.parts:
            turns = min(args.repeats, _MOST_TURNS)
            session = Session(group, place, repeats=turns, backends=["cuda"])
            points = make_points(args.shape, group.num_ranks)
            found["exchanges"] = measure_budgets(session, points, _SMS, turns)
        group.check()
    if jax.process_index() > 0:
        return
    records = {part: [row.record for row in rows] for part, rows in found.items()}
    entry = {
        **make_entry(records, place),
        "device": mesh.devices.flat[0].device_kind,
        "num_ranks": mesh.devices.size,
    }
    for rows in found.values():
        print(report.format_table(rows))
    _write(args.out, entry)
    print(f"the table of {entry['device']}, {entry['num_ranks']} ranks: {args.out}")
    for part, own in records.items():
        ops = reduce.OPS if part == "sums" else EXCHANGES
        save(own, ops, place, args.records, plot=args.plot)


def measure(session: Session, sizes: Sequence[int], repeats: int) -> list[report.Row]:
    """All sums at all sizes that hold a row."""
    found = (
        make_reduce_point(op, size, dtype="bf16", hidden=reduce.HIDDEN)
        for op in reduce.OPS
        for size in sizes
    )
    points = [point for point in found if point is not None]
    with report.progress(len(points) * repeats) as progress:
        return [row for p in points for row in session.measure(p.op, p, progress)]


def make_points(shape: str, num_ranks: int) -> list[Point]:
    """A shape in both layouts, as experts need it: groups of whole tiles in the expert layout."""
    sizes = SHAPES[shape]
    sizes = replace(sizes, experts=sizes.experts // num_ranks * num_ranks)
    facts: dict[str, Any] = {"dtype": "bf16", "num_ranks": num_ranks, "balance": "auto"}
    return [
        make_point(shape, sizes, layout="rank", fill="zeros", **facts),
        make_point(shape, sizes, layout="expert", fill="padding", alignment=128, **facts),
    ]


def measure_budgets(
    session: Session, points: Sequence[Point], budgets: Sequence[int], turns: int
) -> list[report.Row]:
    """All exchanges at all points, with all budgets and by the back end `xla`."""
    with report.progress(len(points) * len(EXCHANGES) * turns) as progress:
        return [row for p in points for row in session.measure_budgets(p, budgets, progress)]


def make_entry(records: Mapping[str, Sequence[Record]], place: Place) -> dict[str, Any]:
    """Makes a table's entry: the measurements, where and when they were made, and the choices."""
    entry: dict[str, Any] = {"measured": {}}
    if "sums" in records:
        found = collect(records["sums"])
        ops = {op: _steps(found[op]) for op in reduce.OPS}
        entry = {**asdict(place), "ops": ops, "measured": {**found}}
    if "exchanges" in records:
        medians = collect_budgets(records["exchanges"])
        entry["budgets"] = {
            "source": f"{place.command}, commit {place.commit}, jax {place.versions['jax']}, "
            f"{place.time}",
            **{
                exchange: {layout: pick_budget(us) for layout, us in layouts.items()}
                for exchange, layouts in medians.items()
            },
        }
        entry["measured"].update(medians)
    return entry


def collect(records: Sequence[Record]) -> Medians:
    """Their medians, by the names that the table has; the stock collective is psum there."""
    found: Medians = {}
    for r in records:
        name = r.algorithm if r.contender == "jax_ep" and r.algorithm else reduce.PSUM
        sizes = found.setdefault(r.op, {})
        sizes.setdefault(r.num_bytes, {})[name] = round(r.us["p50"], 2)
    return found


def collect_budgets(records: Sequence[Record]) -> BudgetMedians:
    """Their medians."""
    found: BudgetMedians = {}
    for r in records:
        assert r.layout is not None
        layouts = found.setdefault(r.op, {})
        us = layouts.setdefault(r.layout, {})
        us["xla" if r.sms is None else r.sms] = round(r.us["p50"], 2)
    return found


def pick_budget(us: Mapping[int | str, float]) -> dict[str, Any]:
    """The smallest budget that is nearly as fast as the fastest one, and no slower than `xla`.

    Where all are slower than that, "auto" takes it.
    """
    ours = {sms: own for sms, own in us.items() if isinstance(sms, int)}
    fastest = min(ours.values())
    near = sorted(sms for sms, own in ours.items() if own <= fastest * _TOLERANCE)
    if us["xla"] < fastest:
        return {"sms": near[0], "backend": "xla"}
    return {"sms": next(sms for sms in near if ours[sms] <= us["xla"])}


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
    """Beside entries of others, and over the same parts of an older one of this device."""
    found = json.loads(path.read_text())["tables"] if path.exists() else []
    own = (entry["device"], entry["num_ranks"])
    kept = [t for t in found if (t["device"], t["num_ranks"]) != own]
    old: dict[str, Any] = next((t for t in found if t not in kept), {})
    measured = {**old.get("measured", {}), **entry.get("measured", {})}
    # A line for each table, so that a difference between two files is one of tables.
    tables = map(json.dumps, [*kept, {**old, **entry, "measured": measured}])
    path.write_text('{"tables": [\n' + ",\n".join(tables) + "\n]}\n")
