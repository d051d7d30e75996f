"""The `bench` command: points, contenders, measurements, results."""

import argparse
import itertools
import uuid
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
from jax.experimental.multihost_utils import process_allgather

import jax_ep
from jax_ep.bench import floor, report, timing
from jax_ep.bench.contenders import Contender, contenders, ours
from jax_ep.bench.record import Measured, Place, Record, make_record
from jax_ep.bench.shapes import BENCH_DTYPES, FP8, SHAPES, Point, make_inputs, make_point
from jax_ep.config import BACKENDS, Fill
from jax_ep.errors import ConfigError
from jax_ep.testing.ranks import make_mesh, on_ranks, prepare_virtual_devices

_TIMEOUT_S = 60.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `bench`."""
    add = parser.add_argument
    add("ops", nargs="*", metavar="OP", default=list(timing.OPS), help=f"of {timing.OPS}")
    add("--shape", nargs="+", choices=SHAPES, default=["tiny"], help="sizes by name")
    add("--tokens", nargs="+", type=int, help="tokens of each rank; several make a sweep")
    for name in ("hidden", "topk", "experts"):
        add(f"--{name}", type=int, help="instead of the shape's")
    add("--dtype", choices=BENCH_DTYPES, default="bf16", help="fp8: dispatch only")
    add("--layout", choices=["rank", "expert", "both"], default="expert")
    add(
        "--balance",
        type=_parse_balance,
        default="auto",
        help="room to receive over a balanced routing's, or none for the worst case; default: "
        "1.25 in the expert layout, none in the rank layout",
    )
    add("--alignment", type=int, default=1, help="expert layout: rows of a group, a multiple of it")
    add("--fill", choices=[f.name.lower() for f in Fill], default="zeros", help="as in dispatch")
    add("--backends", nargs="+", choices=BACKENDS, help="of ours; default: all that are usable")
    add("--sms", nargs="+", type=int, help="SM budgets of the cuda back end; default: the group's")
    add("--ranks", type=int, help="use the first of jax.devices(); default: all, 8 on CPU")
    add("--repeats", type=int, default=20)
    add("--out", type=Path, default=Path("benchmarks/results"), help="folder of the results")
    add("--commit", help="what to record in place of what git says here")
    add("--plot", action="store_true", help="draw time over floor; needs matplotlib")


def _parse_balance(text: str) -> float | str | None:
    return {"none": None, "auto": "auto"}[text] if text in ("none", "auto") else float(text)


def main(args: argparse.Namespace) -> None:
    """Measures, prints a table, writes the records."""
    prepare_virtual_devices(args.ranks or 8)
    num_ranks = args.ranks or len(jax.devices())
    points = list(make_points(args, num_ranks))
    place = Place.find(args.commit)
    is_cpu = jax.devices()[0].platform == "cpu"
    copy_rate = _measure_copy_rate() if is_cpu else None
    print(f"{num_ranks} ranks of {place.device}, jax {place.versions['jax']}")
    if copy_rate is not None:
        print(f"memcpy, all cores: {copy_rate / 1e9:.2f} GB/s copied")
    mesh = make_mesh(num_ranks)
    rows = []
    with jax_ep.Group.open(mesh, "ep", name="bench", timeout=_TIMEOUT_S) as group:
        session = Session(group, place, copy_rate, args)
        pairs = list(itertools.product(points, args.ops))
        total = sum(len(session.entrants(op, point)) for point, op in pairs) * args.repeats
        with report.Progress(total) as progress:
            for point, op in pairs:
                rows += session.measure(op, point, progress)
        group.check()
    if jax.process_index() > 0:
        return
    print(report.format_table(rows))
    _save([row.record for row in rows], args, place)


def _measure_copy_rate() -> float:
    """By process 0, while the others wait: they may share a memory."""
    return float(timing.slowest(floor.measure_copy_rate() if jax.process_index() == 0 else 0.0))


def make_points(args: argparse.Namespace, num_ranks: int) -> Iterator[Point]:
    """All points that a command line asks for."""
    unknown = [op for op in args.ops if op not in timing.OPS]
    if unknown:
        raise ConfigError(f"bench: ops must be of {', '.join(timing.OPS)}, got {unknown[0]!r}")
    if args.dtype == FP8 and not all(op.endswith("dispatch") for op in args.ops):
        raise ConfigError(f"bench: fp8 rows are dispatched only, got {' '.join(args.ops)}")
    given = {n: getattr(args, n) for n in ("hidden", "topk", "experts")}
    changes = {name: value for name, value in given.items() if value is not None}
    layouts = ("rank", "expert") if args.layout == "both" else (args.layout,)
    for name, layout in itertools.product(args.shape, layouts):
        shape = replace(SHAPES[name], **changes)
        for tokens in args.tokens or [shape.tokens]:
            yield make_point(
                name,
                replace(shape, tokens=tokens),
                dtype=args.dtype,
                layout=layout,
                num_ranks=num_ranks,
                balance=args.balance,
                alignment=args.alignment,
                fill=args.fill,
            )


class Session:
    """What all points of one command share."""

    def __init__(
        self, group: jax_ep.Group, place: Place, copy_rate: float | None, args: argparse.Namespace
    ):
        usable = [b for b, reason in group.info().backends.items() if reason == "usable"]
        backends: list[str] = args.backends or usable
        budgets: list[int] = args.sms or [group.num_sms]
        self.entries: list[tuple[str, int | None]] = [
            (backend, sms)
            for backend in backends
            for sms in (budgets if backend == "cuda" else [None])
        ]
        self._group, self._place, self._copy_rate = group, place, copy_rate
        self._repeats: int = args.repeats

    def entrants(self, op: str, point: Point) -> list[Contender]:
        """Who can do the operation."""
        everyone = contenders(point, self._group, self.entries)
        return [e for e in everyone if op != "cached_dispatch" or e.again is not None]

    def measure(self, op: str, point: Point, progress: report.Progress) -> list[report.Row]:
        """All contenders of one operation at one point, interleaved, under one run id."""
        progress.label(f"{op} {point.shape} {point.num_tokens} {point.layout}")
        mesh = self._group.mesh
        inputs = make_inputs(point, mesh)
        entrants = self.entrants(op, point)
        programs = [timing.make_program(op, entrant) for entrant in entrants]
        chains = [timing.Chain(program, mesh, inputs) for program in programs]
        extra = [chain.extra_memory() for chain in chains]
        taken = timing.measure(chains, repeats=self._repeats, tick=progress.tick)
        recv_src = _route(point, self._group, self.entries[0][0], inputs)
        moved = floor.traffic(op, point, recv_src)
        run = uuid.uuid4().hex
        rows = []
        for entrant, own, extra_bytes in zip(entrants, taken, extra, strict=True):
            measured = Measured(
                us=own.percentiles(),
                bytes=int((moved.read + moved.written).max()),
                wire_bytes=int(moved.wire.max()),
                floor_us=self._floor_us(moved),
                extra_memory_bytes=extra_bytes,
            )
            record = make_record(op, point, entrant, measured, place=self._place, run=run)
            rows.append(report.Row(record, own))
        return rows

    def _floor_us(self, moved: floor.Traffic) -> float:
        if self._copy_rate is None:
            return floor.gpu_floor_us(moved)
        return floor.cpu_floor_us(moved, self._copy_rate)


def _route(point: Point, group: jax_ep.Group, backend: str, inputs: Any) -> Any:
    """recv_src [R, C] of a dispatch at the point."""
    dispatch = ours(point, group, backend, None).dispatch
    recv_src = on_ranks(lambda *own: dispatch(*own).handle.recv_src, group.mesh)(*inputs)
    return process_allgather(recv_src, tiled=True)


def _save(records: list[Record], args: argparse.Namespace, place: Place) -> None:
    ops = "-".join(dict.fromkeys(args.ops))
    path = args.out / f"{datetime.now(UTC):%Y-%m-%d}-{place.slug()}-{ops}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(record.to_json() + "\n" for record in records)
    print(f"{len(records)} records appended to {path}")
    if args.plot:
        report.plot(records, path.with_suffix(".png"))
        print(f"plot: {path.with_suffix('.png')}")
