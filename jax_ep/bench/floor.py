"""Floor of a time: the bytes that an operation must move, over the machine's rate."""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from jax_ep.bench.shapes import Point, ReducePoint

# Measured on 2 x H100 SXM, driver 580, with kernels that only load or copy: loads from the peer by
# 16 or more SMs with both directions busy, and bytes copied inside one GPU's memory.
NVLINK_BYTES_PER_S = 337e9
HBM_COPY_BYTES_PER_S = 1415e9

_COPY_BYTES = 64 << 20
_COPY_REPEATS = 8

Bytes = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Traffic:
    """Bytes of one operation, [R] each: those of every rank.

    Attributes:
      wire: bytes from other ranks, a token once however many of its experts are here.
      read: bytes read from any memory, once for each row that is made of them.
      read_once: the same, but a token that becomes several rows of one rank only once.
      written: bytes written. Zeros of unused rows are left out: no data moves.
    """

    wire: Bytes
    read: Bytes
    read_once: Bytes
    written: Bytes

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(
            wire=self.wire + other.wire,
            read=self.read + other.read,
            read_once=self.read_once + other.read_once,
            written=self.written + other.written,
        )


def traffic(op: str, point: Point, recv_src: Any) -> Traffic:
    """Bytes of `op` for a routing.

    A dispatch reads and writes each received row once. A combine reads each received row once and
    writes one row per token. On the wire, both move one row per (token, other rank).

    Args:
      op: "dispatch", "combine" or "round_trip", the sum of the two.
      point: the sizes.
      recv_src: [R, C] of the handle.
    """
    if op == "round_trip":
        return traffic("dispatch", point, recv_src) + traffic("combine", point, recv_src)
    recv_src = np.asarray(recv_src)
    rows = np.sum(recv_src >= 0, axis=1)
    pairs = _count_pairs(point, recv_src)
    remote = pairs * ~np.eye(point.num_ranks, dtype=bool)
    if op in ("dispatch", "cached_dispatch"):
        wire, read_once, written = remote.sum(axis=0), pairs.sum(axis=0), rows
    else:
        wire, read_once, written = remote.sum(axis=1), rows, np.full_like(rows, point.num_tokens)
    size = point.row_bytes
    return Traffic(wire * size, rows * size, read_once * size, written * size)


def _count_pairs(point: Point, recv_src: Bytes) -> Bytes:
    """[source, destination]: tokens that have rows there."""
    is_pair = np.zeros((point.num_ranks * point.num_tokens, point.num_ranks), bool)
    for dst, sources in enumerate(recv_src):
        is_pair[sources[sources >= 0], dst] = True
    counts: Bytes = is_pair.reshape(point.num_ranks, point.num_tokens, -1).sum(axis=1)
    return counts


def reduce_traffic(point: ReducePoint, num_ranks: int) -> Traffic:
    """Bytes of an operation of the all_reduce family, alike on all ranks.

    No switch adds up on the way: a scatter takes in a part from every other rank, a gather an
    array, and a sum of everything is a scatter of 1 / num_ranks of it and the gather of the sums.
    """
    size = point.num_bytes
    others = (num_ranks - 1) * size
    wire, read, written = {
        "all_reduce": (2 * others // num_ranks, size, size),
        "reduce_scatter": (others, num_ranks * size, size),
        "all_gather": (others, num_ranks * size, num_ranks * size),
        # Beside x and the norm: the residual, read and written, and the scale.
        "all_reduce_residual_rmsnorm": (
            2 * others // num_ranks,
            2 * size + point.row_bytes,
            2 * size,
        ),
    }[point.op]
    wires, reads, writes = (np.full(num_ranks, n) for n in (wire, read, written))
    return Traffic(wire=wires, read=reads, read_once=reads, written=writes)


def cpu_floor_us(moved: Traffic, copy_bytes_per_s: float) -> float:
    """All ranks share one memory: bytes read plus bytes written, over what a copy does of both.

    A copy of n bytes reads n and writes n, so for a dispatch this is rows * row_bytes / rate.
    """
    return float((moved.read + moved.written).sum() / (2 * copy_bytes_per_s) * 1e6)


def gpu_floor_us(moved: Traffic) -> float:
    """The busiest rank: wire over NVLink, reads and writes over HBM, whichever takes longer.

    HBM moves twice the bytes that it copies; what a rank reads from a peer costs the peer's HBM as
    much as its own reads would.
    """
    nvlink = moved.wire.max() / NVLINK_BYTES_PER_S
    hbm = (moved.read_once + moved.written).max() / (2 * HBM_COPY_BYTES_PER_S)
    return float(max(nvlink, hbm) * 1e6)


def measure_copy_rate() -> float:
    """Bytes copied a second: NumPy copies of 64 MiB in as many threads as cores, best of eight."""
    num_threads = len(os.sched_getaffinity(0))
    buffers = [
        (np.ones(_COPY_BYTES, np.uint8), np.zeros(_COPY_BYTES, np.uint8))
        for _ in range(num_threads)
    ]
    best = float("inf")
    with ThreadPoolExecutor(num_threads) as pool:
        for _ in range(_COPY_REPEATS):
            begin = time.perf_counter()
            list(pool.map(lambda pair: np.copyto(pair[1], pair[0]), buffers))
            best = min(best, time.perf_counter() - begin)
    return num_threads * _COPY_BYTES / best
