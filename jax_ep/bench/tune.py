"""`python -m jax_ep tune` measures which algorithm is fastest, and writes a table."""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax

import jax_ep
from jax_ep._tuning import OPS
from jax_ep.bench import reduce
from jax_ep.bench.record import Place
from jax_ep.errors import GroupError
from jax_ep.testing.ranks import make_mesh

_MEASURED_AS = {"reduce_scatter": "halves", "all_gather": "halves"}
_LARGE_BYTES = 4 << 20  # from here on shorter chains do


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `tune`."""
    add = parser.add_argument
    add("--out", type=Path, required=True, help="table to write; entries of others are kept")
    add("--most-mib", type=int, default=64, help="largest size; beyond it the last choice holds")
    add("--plot", type=Path, help="also draw what was measured (needs matplotlib)")
    add("--repeats", type=int, default=7)
    add("--commit", help="what to record in place of what git says here")


def main(args: argparse.Namespace) -> None:
    """Measures on all devices; process 0 writes."""
    mesh = make_mesh(len(jax.devices()))
    sizes = [1 << shift for shift in range(10, (args.most_mib << 20).bit_length(), 2)]
    with jax_ep.Group.open(mesh, "ep", name="tune", timeout=60.0) as group:
        if group.backend != "cuda":
            raise GroupError(f"tune: there is nothing to choose on back end {group.backend!r}")
        if group.spec.staging_bytes is not None:
            raise GroupError(f"tune: not where operands are staged: {group.info().staging}")
        found = {op: _measure(group, op, sizes, args.repeats) for op in reduce.OPS}
    entry = {
        "device": mesh.devices.flat[0].device_kind,
        "num_ranks": mesh.devices.size,
        "ops": {op: _steps(found[_MEASURED_AS.get(op, op)]) for op in OPS},
        "measured": found,
        **asdict(Place.find(args.commit)),
    }
    if jax.process_index() == 0:
        _write(args.out, entry)
        print(f"the table of {entry['device']}, {entry['num_ranks']} ranks: {args.out}")
        if args.plot is not None:
            plot(entry, args.plot)


def _measure(
    group: jax_ep.Group, op: str, sizes: Sequence[int], repeats: int
) -> dict[int, dict[str, float]]:
    """Microseconds, by bytes and algorithm."""
    found = {}
    for num_bytes in sizes:
        if op == "all_reduce_residual_rmsnorm" and num_bytes < 2 * reduce.HIDDEN:
            continue
        steps = reduce.STEPS if num_bytes < _LARGE_BYTES else reduce.STEPS // 4
        measured = reduce.measure(group, op, num_bytes, repeats=repeats, steps=steps)
        found[num_bytes] = {m.algorithm: round(m.us, 2) for m in measured}
        line = ", ".join(f"{name} {us:.1f}" for name, us in found[num_bytes].items())
        print(f"{op}, {num_bytes} bytes: {line}", flush=True)
    return found


def _steps(found: dict[int, dict[str, float]]) -> list[list[Any]]:
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


def _write(path: Path, entry: dict[str, Any]) -> None:
    tables = json.loads(path.read_text())["tables"] if path.exists() else []
    own = (entry["device"], entry["num_ranks"])
    kept = [t for t in tables if (t["device"], t["num_ranks"]) != own]
    path.write_text(json.dumps({"tables": [*kept, entry]}, indent=1) + "\n")


def plot(entry: Mapping[str, Any], path: Path) -> None:
    """Time over bytes of every algorithm, one panel for each operation. Needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.0 * len(entry["measured"]), 4.0), layout="constrained")
    panels = figure.subplots(1, len(entry["measured"]), sharey=True)
    names = (*reduce.OURS, "psum")
    for axes, (op, found) in zip(panels, entry["measured"].items(), strict=True):
        for color, name in enumerate(names):
            points = [(int(num_bytes), us[name]) for num_bytes, us in found.items() if name in us]
            if points:
                axes.plot(*zip(*points, strict=True), f"C{color}.-", label=name)
        axes.set(xscale="log", yscale="log", xlabel="bytes of a rank", title=op)
    panels[0].set_ylabel("microseconds")
    panels[0].legend(fontsize="small")
    figure.suptitle(f"{entry['device']}, {entry['num_ranks']} ranks", fontsize="medium")
    figure.savefig(path)
