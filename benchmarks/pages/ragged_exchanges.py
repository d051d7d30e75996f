"""The table of ragged exchanges."""

from typing import Any

from records import H200, Row, pick, source, table, us

NOTHING = "*No record has these times yet.*\n"
_AT = {"op": "ragged_all_to_all", "device": H200, "num_ranks": 2, "num_processes": 1}
_KINDS = ("balanced", "skewed", "mostly_empty")
_POINT = ("kind", "kib", "pieces")
_MANY = 100  # a cell of fewer steps says how many
_OTHER_KERNEL = "use_device_kernel=true"  # in the flags that choose XLA's other kernel


def ragged(page: str) -> str:
    """Single steps of ours, of XLA's two kernels, and of an all_to_all of padded parts."""
    points: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for record in pick(timing="steps", **_AT):
        is_other = _OTHER_KERNEL in record["xla_flags"]
        if is_other and record["contender"] != "ragged_all_to_all":
            continue
        column = "other kernel" if is_other else record["contender"]
        points.setdefault(tuple(record[k] for k in _POINT), {})[column] = record
    rows: list[Row] = []
    used: list[dict[str, Any]] = []
    for point in sorted(points, key=lambda p: (_KINDS.index(p[0]), *p[1:])):
        found = points[point]
        ours = found.get("jax_ep")
        if ours is None:
            continue
        kind, kib, pieces = point
        stock = (_cell(found.get(c)) for c in ("ragged_all_to_all", "other kernel", "all_to_all"))
        mine = (us(ours["us"][p]) for p in ("p50", "p99"))
        name = f"{kind.replace('_', ' ')}, {pieces} a peer"
        rows.append((name, f"{kib:,}", *mine, *stock, us(ours["floor_us"])))
        used += found.values()
    if not rows:
        return NOTHING
    xla = ("XLA's `ragged_all_to_all`", "its other kernel")
    head = ("pieces", "KiB", "jax_ep", "p99", *xla, "padded `all_to_all`", "floor")
    return table(head, rows) + source(used, page)


def _cell(record: dict[str, Any] | None) -> str:
    if record is None:
        return ""
    count = record["steps"]["count"]
    return us(record["us"]["p50"]) + (f" ({count} steps)" if count < _MANY else "")
