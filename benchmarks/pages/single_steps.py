"""Tables of single steps of sums, which the devices' clocks have timed, and of a late rank."""

from collections.abc import Callable, Sequence
from typing import Any

from records import H200, SUMS, pick, short_size, source, table, us

NOTHING = "*No record has these times yet.*\n"
_POINT = ("op", "shape", "layout", "dtype", "tokens", "hidden", "num_ranks", "num_processes")
Times = dict[str, Any]


def single_steps(page: str) -> str:
    """Percentiles of small sums, beside stock JAX."""

    def cells(ours: Times, stock: Times | None) -> Sequence[str]:
        own = [us(ours["steps"]["us"][p]) for p in ("p50", "p90", "p99")]
        theirs = [us(stock["steps"]["us"][p]) if stock else "" for p in ("p50", "p99")]
        return (us(ours["us"]["p50"]), *own, *theirs)

    head = ("one operation", "GPUs", "chain", "step p50", "p90", "p99", "stock p50", "stock p99")
    return _table(page, head, cells, _newest("us"))


def a_late_rank(page: str) -> str:
    """How long the operation of the others takes while one rank is late."""

    def cells(ours: Times, stock: Times | None) -> Sequence[str]:
        steps = ours["steps"]
        late = steps["delayed_us"]
        rest = late["p50"] - steps["delay_us"]
        return (us(steps["us"]["p50"]), us(late["p50"]), us(late["p99"]), us(rest))

    found = _newest("delayed_us")
    by = ", ".join(sorted({f"{r['steps']['delay_us']:,}" for r in found}))
    head = ("one operation", "GPUs", "in time", f"late by {by}", "p99", "less the delay")
    return _table(page, head, cells, found)


def _newest(field: str) -> list[Times]:
    """The newest record of each sum that has a field of the steps; ours, low latency."""
    newest = {}
    for record in pick(device=H200, contender="jax_ep", algorithm="low_latency"):
        if record["op"] in SUMS and (record.get("steps") or {}).get(field):
            newest[tuple(record[k] for k in _POINT)] = record
    return list(newest.values())


def _table(
    page: str,
    head: Sequence[str],
    cells: Callable[[Times, Times | None], Sequence[str]],
    found: Sequence[Times],
) -> str:
    if not found:
        return NOTHING
    rows = []
    for record in found:
        beside = pick(run=record["run"], **{k: record[k] for k in _POINT})
        stock = [r for r in beside if r["contender"] != "jax_ep" and r.get("steps")]
        best = min(stock, key=lambda r: r["steps"]["us"]["p50"], default=None)
        rows.append((_name(record), str(record["num_ranks"]), *cells(record, best)))
    return table(head, rows) + source(found, page)


def _name(record: Times) -> str:
    """The operation and its sizes."""
    several = f", {record['num_processes']} processes" if record["num_processes"] > 1 else ""
    return f"`{record['op']}`, {record['dtype']}, {short_size(record['shape'])}{several}"
