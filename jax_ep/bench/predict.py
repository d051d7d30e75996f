"""`python -m jax_ep model` predicts the times of dispatch and combine to 2,048 ranks."""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from jax_ep.bench import model
from jax_ep.bench.published import group, read_published, summarize
from jax_ep.bench.shapes import SHAPES

RANKS = (8, 16, 64, 256, 2048)
_MOST_FEW = 128  # tokens of a rank that the kernels for few tokens carry by themselves


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `model`."""
    add = parser.add_argument
    add("--ranks", nargs="+", type=int, default=list(RANKS))
    add("--machine", choices=model.MACHINES, default="h200", help="its links")
    add("--ranks-per-node", type=int, help="that NVLink joins; default: the machine's")
    add("--shape", choices=SHAPES, default="deepseek-v3", help="experts: one a rank at least")
    add("--tokens", type=int, help="of each rank, instead of the shape's")
    add("--dtype", choices=["bf16", "fp8"], default="bf16", help="of dispatched rows")
    add("--mode", choices=model.MODES, help=f"default: low_latency for {_MOST_FEW} tokens or less")
    add(
        "--max-nodes",
        type=int,
        help="group-limited routing: nodes that a token may go to, instead of the shape's",
    )
    add(
        "--published",
        type=Path,
        metavar="CSV",
        help="print how far the model is from published times instead: benchmarks/published.csv",
    )


def main(args: argparse.Namespace) -> None:
    """Prints a table of predictions, or of errors."""
    lines = _errors(args.published) if args.published else _predictions(args)
    table = list(lines)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for first, *rest in table:
        cells = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        print("  ".join([first.ljust(widths[0]), *cells]))
    if not args.published:
        print("Predictions of a model, not measurements. Bytes and flags are those of one rank.")


def _predictions(args: argparse.Namespace) -> Iterator[Sequence[str]]:
    machine = model.MACHINES[args.machine]
    if args.ranks_per_node is not None:
        machine = machine._replace(ranks_per_node=args.ranks_per_node)
    shape = SHAPES[args.shape]
    tokens = args.tokens if args.tokens is not None else shape.tokens
    mode = args.mode or ("low_latency" if tokens <= _MOST_FEW else "throughput")
    yield "operation", "ranks", "nodes", "network MB", "NVLink MB", "flags", "us", "bound by"
    for op in model.OPS:
        alone = model.Exchange(
            num_ranks=1,
            ranks_per_node=1,
            tokens=tokens,
            hidden=shape.hidden,
            topk=shape.topk,
            experts=shape.experts,
            dtype=args.dtype if op == "dispatch" else "bf16",
            max_nodes=shape.max_nodes if args.max_nodes is None else args.max_nodes,
        )
        for num_ranks in args.ranks:
            exchange = model.grow(alone, num_ranks, machine)
            found = model.predict(model.OURS[mode, op], exchange, machine)
            moved = found.traffic
            yield (
                f"{op}, {exchange.dtype}",
                f"{num_ranks:,}",
                f"{exchange.num_nodes:,}",
                f"{moved.network_bytes / 1e6:,.1f}",
                f"{moved.nvlink_bytes / 1e6:,.1f}",
                f"{moved.network_flags + moved.nvlink_flags:,}",
                f"{found.us:,.0f}",
                found.bound,
            )


def _errors(path: Path) -> Iterator[Sequence[str]]:
    rows = [row for row in read_published(path) if not row.fitted]
    yield "system", "level", "mode", "rows", "median error", "median size", "largest"
    for names, found in [*group(rows).items(), (("all that were not fitted", "", ""), rows)]:
        sums = summarize(found)
        cells = f"{sums.median:+.0%}", f"{sums.median_size:.0%}", f"{sums.largest:+.0%}"
        yield *names, str(sums.num_rows), *cells
