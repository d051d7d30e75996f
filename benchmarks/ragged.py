"""Ragged exchanges: ours, XLA's, and an all_to_all of padded parts.

    python benchmarks/ragged.py --kib 8 57344 --pieces 1 3 30 120 --out benchmarks/results

Every rank sends so many KiB of rows. The devices' clocks time single steps, and percentiles are of
the slowest rank. Contenders that take milliseconds get few steps; records name the count. XLA's
other kernel for GPUs is measured by running the program again under the flags that choose it;
records name the flags.
"""

import argparse
import itertools
import uuid
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jax_ep
from jax_ep.bench import steps
from jax_ep.bench.contenders import has_ragged_all_to_all
from jax_ep.bench.floor import NVLINK_BYTES_PER_S
from jax_ep.bench.record import append_brief_records, brief_record
from jax_ep.bench.timing import Carry
from jax_ep.testing.conformance.ragged import swap
from jax_ep.testing.ranks import make_mesh, place, virtual_devices

SLOW_US = 2000.0  # an exchange that takes longer gets few steps
HIDDEN = 7168  # elements of a row of bf16, where the array has so many


class Exchange(NamedTuple):
    """Rows of each piece [R, K] that every rank sends, and the table of ragged_all_to_all."""

    num_rows: int
    num_places: int
    hidden: int
    table: tuple[Any, Any, Any, Any]


def share_rows(kind: str, num_rows: int, num_ranks: int) -> Any:
    """Returns [R, R], rows from each rank to each."""
    ranks = np.arange(num_ranks)
    distance = (ranks[None] - ranks[:, None]) % num_ranks
    weights = {
        "balanced": np.ones((num_ranks, num_ranks)),
        "skewed": 1.0 / (1 + ranks[None] + 0 * distance),  # rank 0 gets most, then rank 1, ...
        "mostly_empty": (distance == 1 % num_ranks).astype(float),  # all rows to the next rank
    }[kind]
    edges = np.floor(num_rows * np.cumsum(weights, axis=1) / weights.sum(axis=1, keepdims=True))
    return np.diff(edges, axis=1, prepend=0).astype(np.int32)


def make_exchange(kind: str, num_bytes: int, per_peer: int, num_ranks: int) -> Exchange:
    """Pieces side by side at both ends; the rows for a rank are cut into equal pieces."""
    hidden = min(HIDDEN, max(8, num_bytes // 2 // (num_ranks * per_peer) // 8 * 8))
    num_rows = max(1, num_bytes // (2 * hidden))
    sizes = share_rows(kind, num_rows, num_ranks)
    numbers = np.arange(per_peer + 1)
    edges = sizes[..., None] * numbers // per_peer
    pieces = np.diff(edges, axis=-1).reshape(num_ranks, -1).astype(np.int32)
    recv_sizes = swap(pieces)
    first, places = (np.cumsum(a, axis=1) - a for a in (pieces, recv_sizes))
    table = first.astype(np.int32), pieces, swap(places.astype(np.int32)), recv_sizes
    return Exchange(num_rows, int(sizes.sum(axis=0).max()), hidden, table)


def padded(exchange: Exchange, x: jax.Array, out: jax.Array, *table: jax.Array) -> jax.Array:
    """all_to_all of parts that are as long as the longest: no rank knows better without counts.

    The parts are taken out of x, but nothing packs them where they arrive.
    """
    num_ranks = len(exchange.table[1])
    sizes = exchange.table[1].reshape(num_ranks, num_ranks, -1).sum(axis=2)
    first = table[0].reshape(num_ranks, -1)[:, :1]
    rows = first + jnp.arange(int(sizes.max()), dtype=jnp.int32)[None]
    is_even = sizes.min() == sizes.max() and sizes.sum() == num_ranks * len(x)
    even = x.reshape(num_ranks, -1, *x.shape[1:]) if is_even else None
    parts = x[jnp.minimum(rows, x.shape[0] - 1)] if even is None else even
    received: jax.Array = jax.lax.all_to_all(parts, "ep", 0, 0)
    return received.reshape(-1, *x.shape[1:])


def ways(
    group: jax_ep.Group, exchange: Exchange, sms: list[int], *, only_ours: bool
) -> dict[str, Callable[..., jax.Array]]:
    """The contenders by name."""
    ours = partial(jax_ep.ragged_all_to_all, axis_name=group)
    found: dict[str, Callable[..., jax.Array]] = {"jax_ep": ours}
    found |= {f"jax_ep, {n} SMs": partial(ours, num_sms=n) for n in sms}
    if only_ours:
        return found
    if has_ragged_all_to_all(group.mesh):
        found["ragged_all_to_all"] = partial(jax.lax.ragged_all_to_all, axis_name="ep")
    return found | {"all_to_all": partial(padded, exchange)}


def links(
    group: jax_ep.Group, exchange: Exchange, contenders: dict[str, Callable[..., jax.Array]]
) -> list[steps.Link]:
    """Every call writes onto what the last one made, so no step copies an array."""
    x, out = (
        np.ones((group.num_ranks, rows, exchange.hidden), jnp.bfloat16)
        for rows in (exchange.num_rows, exchange.num_places)
    )
    x, out, *table = place((x, out, *exchange.table), group.mesh)
    carry = Carry((x, *table), out)
    return [steps.Link(partial(_call, run), carry) for run in contenders.values()]


def _call(run: Callable[..., jax.Array], given: Any, made: jax.Array) -> jax.Array:
    x, *table = given
    return run(x, made, *table)


def main() -> None:
    """Measures, prints, writes the records."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--kib", nargs="+", type=int, default=[8, 256, 8192, 57344], help="of each rank")
    add("--pieces", nargs="+", type=int, default=[1, 30], help="for each peer")
    kinds = ["balanced", "skewed", "mostly_empty"]
    add("--kind", nargs="+", choices=kinds, default=kinds)
    add("--sms", nargs="+", type=int, default=[], help="budgets beside the group's own")
    add("--stock-kind", nargs="+", choices=kinds, help="with stock contenders; default: the first")
    add("--only-ours", action="store_true", help="no stock contenders for any kind")
    add("--steps", type=int, default=1000, help="of each contender that is not slow")
    add("--out", type=Path, default=Path("benchmarks/results"))
    add("--commit", help="what to record in place of what git says here")
    args = parser.parse_args()
    stock_kinds = [] if args.only_ours else args.stock_kind or args.kind[:1]

    virtual_devices()
    mesh = make_mesh(len(jax.devices()))
    records = []
    with jax_ep.Group.open(mesh, "ep", name="ragged", timeout=60.0) as group:
        for kind, kib, per_peer in itertools.product(args.kind, args.kib, args.pieces):
            exchange = make_exchange(kind, kib * 1024, per_peer, group.num_ranks)
            sizes = exchange.table[1].reshape(group.num_ranks, group.num_ranks, -1).sum(axis=2)
            remote = sizes * ~np.eye(group.num_ranks, dtype=bool)
            wire = int(remote.sum(axis=0).max()) * 2 * exchange.hidden
            contenders = ways(group, exchange, args.sms, only_ours=kind not in stock_kinds)
            timed = links(group, exchange, contenders)
            taken = steps.measure(timed, group, num_steps=args.steps, slow_us=SLOW_US)
            found = dict(zip(contenders, taken, strict=True))
            print(
                f"{kind}, {kib} KiB, {per_peer} pieces a peer: "
                + ", ".join(f"{name} {own.us['p50']:.1f} us" for name, own in found.items())
                + f"; ours {wire / found['jax_ep'].us['p50'] / 1e3:.1f} GB/s over the link",
                flush=True,
            )
            run = uuid.uuid4().hex
            records += [
                brief_record(
                    "ragged_all_to_all",
                    name,
                    group.backend if name.startswith("jax_ep") else "xla",
                    own.us,
                    run,
                    kind=kind,
                    kib=kib,
                    pieces=per_peer,
                    num_ranks=group.num_ranks,
                    hidden=exchange.hidden,
                    dtype="bf16",
                    wire_bytes=wire,
                    floor_us=wire / NVLINK_BYTES_PER_S * 1e6,
                    timing="steps",
                    steps=asdict(own),
                )
                for name, own in found.items()
            ]
    append_brief_records(args.out, "ragged", records, args.commit)


if __name__ == "__main__":
    main()
