"""Memory that an operation takes beyond its operands and results."""

import ctypes
from pathlib import Path
from typing import Any

import jax


def extra_bytes(compiled: Any, operands: Any, num_ranks: int) -> int | None:
    """Bytes of one of this process's ranks, while `compiled(operands)` runs; None if unknown.

    CPU: the highest resident memory of the process during one run, less that before it, less the
    results, over the ranks; so it holds what host twins allocate by themselves. Linux with glibc
    only. Elsewhere: the temporaries of the executable as XLA reports them, which leaves out what a
    group maps outside of XLA.
    """
    jax.block_until_ready(compiled(operands))
    if jax.devices()[0].platform != "cpu":
        analysis = compiled.memory_analysis()
        return None if analysis is None else int(analysis.temp_size_in_bytes)
    if not _start_watching():
        return None
    before = _status_bytes("VmRSS")
    results = jax.block_until_ready(compiled(operands))
    peak = _status_bytes("VmHWM")
    shards = [shard for leaf in jax.tree.leaves(results) for shard in leaf.addressable_shards]
    kept = sum(shard.data.nbytes for shard in shards)
    return int(max(0, peak - before - kept)) // num_ranks


def _start_watching() -> bool:
    """Gives free memory back to the system and forgets the highest resident size."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return False
    return True


def _status_bytes(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)
