"""The `conformance` command: runs the checks on this machine's devices, and prints a table."""

import argparse
import sys
import time
import traceback
from collections import Counter

import jax

import jax_ep
from jax_ep._src.base.config import BACKENDS
from jax_ep._src.base.errors import ConfigError, GroupError
from jax_ep.testing import conformance
from jax_ep.testing.ranks import make_mesh, virtual_devices

_IN_FLIGHT_BYTES = 32 << 20  # enough for the sizes of the checks
_TIMEOUT_S = 120.0
_PASSED, _FAILED, _NOT_USABLE = "passed", "FAILED", "not usable"
_WIDTH = 14


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the `conformance` command."""
    add = parser.add_argument
    add("--backend", nargs="+", choices=BACKENDS, help="default: every one that is usable")
    add("--ranks", type=int, help="use the first of jax.devices(); default: all, 8 on CPU")
    add("--ranks-per-node", type=int, help="ranks of one node; default: all")
    add("--full", action="store_true", help="many more combinations of sizes; takes minutes")
    add("--only", default="", metavar="TEXT", help="checks whose name holds this")


def main(args: argparse.Namespace) -> int:
    """Runs the checks and prints a line for each; returns the number of failures."""
    checks = [c for c in (conformance.FULL if args.full else conformance.CHECKS)
              if args.only in c.name]  # fmt: skip
    if not checks:
        raise ConfigError(f"conformance: no check's name holds {args.only!r}")
    virtual_devices(args.ranks or 8)
    mesh = make_mesh(args.ranks or len(jax.devices()))
    seen: Counter[str] = Counter()
    with jax_ep.Group.open(
        mesh,
        "ep",
        name="conformance",
        timeout=_TIMEOUT_S,
        in_flight_bytes=_IN_FLIGHT_BYTES,
        ranks_per_node=args.ranks_per_node,
    ) as group:
        backends = _choose(args.backend, group)
        kind = mesh.devices.flat[0].device_kind
        num_nodes = group.num_ranks // group.ranks_per_node
        nodes = f" in {num_nodes} nodes" if num_nodes > 1 else ""
        print(f"{group.num_ranks} ranks of {kind}{nodes}, jax {jax.__version__}")
        columns = [f"{backend:>{_WIDTH}}" for backend in backends]
        print("".join(columns) + "  check")
        for check in checks:
            for backend in backends:
                result, cell = _run(check, group, backend)
                seen[result] += 1
                print(f"{cell:>{_WIDTH}}", end="", flush=True)
            print(f"  {check.name}", flush=True)
    print(", ".join(f"{count} {result}" for result, count in seen.items()))
    return seen[_FAILED]


def _choose(wanted: list[str] | None, group: jax_ep.Group) -> list[str]:
    for backend in wanted or ():
        if not group.backends[backend].ops:
            reason = group.backends[backend].reason
            raise GroupError(f"conformance: back end {backend!r} is not usable here: {reason}")
    return wanted or [name for name in BACKENDS if group.backends[name].ops]


def _run(check: conformance.Check, group: jax_ep.Group, backend: str) -> tuple[str, str]:
    """Runs a check; returns its result and its cell in the table."""
    if check.not_usable(group, backend):
        return _NOT_USABLE, "-"
    start = time.perf_counter()
    try:
        check(group, backend)
        result, word = _PASSED, "ok"
    except Exception:
        print(f"\n{backend}: {check.name}", file=sys.stderr)
        traceback.print_exc()
        result, word = _FAILED, _FAILED
    return result, f"{word} {time.perf_counter() - start:.1f} s"
