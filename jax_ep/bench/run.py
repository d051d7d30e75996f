"""The `bench` command: points, contenders, measurements, results."""

import argparse
import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import jax

import jax_ep
from jax_ep._src.base import limits
from jax_ep._src.base.config import BACKENDS
from jax_ep._src.base.errors import ConfigError
from jax_ep._src.base.options import Fill
from jax_ep.bench import reduce, report, timing
from jax_ep.bench.contenders import low_latency_payload
from jax_ep.bench.record import find_place
from jax_ep.bench.session import Session, measure_copy_rate, save
from jax_ep.bench.shapes import (
    BENCH_DTYPES,
    FP8,
    SHAPES,
    Point,
    ReducePoint,
    make_point,
    make_reduce_point,
)
from jax_ep.testing.ranks import make_mesh, virtual_devices

OPS = (*timing.OPS, *reduce.OPS)
_TIMEOUT_S = 60.0
_MAX_FEW = 1024  # tokens of a rank for which the kernels for few tokens are measured
_STEPS = 1000
_KIB = {"gpu": [4.0**i for i in range(9)], "cpu": [16.0, 256.0]}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `bench`."""
    add = parser.add_argument
    add("ops", nargs="*", metavar="OP", default=list(OPS), help=f"of {OPS}; default: all")
    add(
        "--shape",
        nargs="+",
        choices=SHAPES,
        default=["tiny"],
        help="of dispatch and combine, by name",
    )
    add("--tokens", nargs="+", type=int, help="tokens of each rank; several make a sweep")
    add("--hidden", type=int, help=f"instead of the shape's; of rows to normalise {reduce.HIDDEN}")
    for name in ("topk", "experts"):
        add(f"--{name}", type=int, help="instead of the shape's")
    add(
        "--max-nodes",
        type=int,
        help="group-limited routing: nodes that a token may go to, instead of the shape's",
    )
    add("--ranks-per-node", type=int, help="as in Group.open")
    add(
        "--kib",
        nargs="+",
        type=float,
        help="the all_reduce family: sizes of a rank's x, of each part for reduce_scatter; "
        "rows are normalised at sizes of at least one; default: "
        + ", on CPUs ".join(" ".join(f"{kib:g}" for kib in sizes) for sizes in _KIB.values()),
    )
    add(
        "--algorithms",
        nargs="+",
        choices=[*reduce.OURS, reduce.PSUM],
        help="of the same; psum: the stock collective; default: all that can carry the size",
    )
    add("--dtype", choices=BENCH_DTYPES, default="bf16", help="fp8: dispatches only")
    add("--layout", choices=["rank", "expert", "both"], default="expert")
    add(
        "--balance",
        type=_parse_balance,
        default="auto",
        help="room to receive over a balanced routing's, or none for the worst case; default: "
        "1.25 in the expert layout, none in the rank layout",
    )
    add("--alignment", type=int, default=1, help="expert layout: rows of a group, a multiple of it")
    add("--fill", choices=list(Fill), default="zeros", help="as in dispatch")
    add("--backends", nargs="+", choices=BACKENDS, help="of ours; default: all that are usable")
    add("--sms", nargs="+", type=int, help="SM budgets of the cuda back end; default: its own")
    add("--ranks", type=int, help="use the first of jax.devices(); default: all, 8 on CPU")
    add("--repeats", type=int, default=20)
    add(
        "--steps",
        type=int,
        help="of sums, and of exchanges of few tokens: steps that the devices' clocks time one by "
        f"one; 0: none; default: {_STEPS} on GPUs or with --delay-us, else 0",
    )
    add(
        "--delay-us",
        type=int,
        help="time as many steps while one rank is late by so much before each operation",
    )
    add(
        "--only-ours",
        action="store_true",
        help="dispatch and combine: no stock contenders, and fewer programs to compile",
    )
    add("--out", type=Path, default=Path("benchmarks/results"), help="folder of the results")
    add("--commit", help="what to record in place of what git says here")
    add(
        "--plot",
        action="store_true",
        help="draw microseconds over tokens or bytes; needs jax_ep[bench]",
    )


def _parse_balance(text: str) -> float | str | None:
    return {"none": None, "auto": "auto"}[text] if text in ("none", "auto") else float(text)


def main(args: argparse.Namespace) -> None:
    """Measures, prints a table, writes the records."""
    virtual_devices(args.ranks or 8)
    num_ranks = args.ranks or len(jax.devices())
    pairs = list(make_pairs(args, num_ranks))
    num_steps = count_steps(args)
    place = find_place(args.commit)
    print(f"{num_ranks} ranks of {place.device}, jax {place.versions['jax']}")
    copy_rate = measure_copy_rate()
    if copy_rate is not None:
        print(f"memcpy, all cores: {copy_rate / 1e9:.2f} GB/s copied")
    rows = []
    few = [p for _, p in pairs if isinstance(p, Point) and p.num_tokens <= _MAX_FEW]
    with jax_ep.Group.open(
        make_mesh(num_ranks),
        "ep",
        name="bench",
        timeout=_TIMEOUT_S,
        ranks_per_node=args.ranks_per_node,
        low_latency_bytes=2 * num_ranks * max(map(low_latency_payload, few), default=0),
    ) as group:
        session = Session(
            group,
            place,
            repeats=args.repeats,
            copy_rate=copy_rate,
            backends=args.backends,
            budgets=args.sms,
            algorithms=args.algorithms,
            only_ours=args.only_ours,
            num_steps=num_steps,
            delay_us=args.delay_us,
        )
        with report.progress(len(pairs) * args.repeats) as progress:
            for op, point in pairs:
                rows += session.measure(op, point, progress)
        group.check()
    if not rows:
        raise ConfigError(
            "bench: nothing to measure: no size holds a row, or no algorithm takes it"
        )
    if jax.process_index() == 0:
        tables = (report.format_table, report.format_clock, report.format_late_table)
        print("\n\n".join(filter(None, (make(rows) for make in tables))))
        records = [row.record for row in rows]
        save(records, args.ops, place, args.out, plot=args.plot)


def count_steps(args: argparse.Namespace) -> int:
    """Returns how many steps of a point a command line wants to have timed one by one."""
    delay_us, steps = args.delay_us, args.steps
    if delay_us is not None and not 0 < delay_us <= limits.MAX_DELAY_US:
        raise ConfigError(f"bench: --delay-us must be 1 to {limits.MAX_DELAY_US}, got {delay_us}")
    if steps is None:
        is_cpu = jax.devices()[0].platform == "cpu"
        return 0 if is_cpu and delay_us is None else _STEPS
    if steps < 0 or (steps == 0 and delay_us is not None):
        raise ConfigError(f"bench: --steps must be positive, or 0 without --delay-us, got {steps}")
    return int(steps)


def make_pairs(
    args: argparse.Namespace, num_ranks: int
) -> Iterator[tuple[str, Point | ReducePoint]]:
    """All operations and points that a command line asks for."""
    unknown = [op for op in args.ops if op not in OPS]
    if unknown:
        raise ConfigError(f"bench: ops must be of {', '.join(OPS)}, got {unknown[0]!r}")
    if args.dtype == FP8 and not all(op.endswith("dispatch") for op in args.ops):
        raise ConfigError(f"bench: fp8 rows are dispatched only, got {' '.join(args.ops)}")
    exchanges = [op for op in args.ops if op in timing.OPS]
    if exchanges:
        for point, op in itertools.product(make_points(args, num_ranks), exchanges):
            yield op, point
    platform = jax.devices()[0].platform
    sizes = args.kib or _KIB["cpu" if platform == "cpu" else "gpu"]
    for op, kib in itertools.product(args.ops, sizes):
        if op in reduce.OPS:
            size = make_reduce_point(
                op, int(kib * 1024), dtype=args.dtype, hidden=args.hidden or reduce.HIDDEN
            )
            if size is not None:
                yield op, size


def make_points(args: argparse.Namespace, num_ranks: int) -> Iterator[Point]:
    """Returns the points of dispatches and combines."""
    given = {n: getattr(args, n) for n in ("hidden", "topk", "experts", "max_nodes")}
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
