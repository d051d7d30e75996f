"""Tables of few tokens: times of single steps, and what a late rank costs."""

from collections.abc import Callable
from typing import Any

from records import H200, Row, pick, source, table, times, us

_AT = {"device": H200, "num_ranks": 2, "num_processes": 1, "contender": "jax_ep", "backend": "cuda"}
_POINT = ("shape", "layout", "dtype", "tokens")
_OPS = ("dispatch", "combine", "round_trip")
_KINDS = ("low_latency", None)  # the kernels for few tokens, and those for many
Records = dict[tuple[str, str | None], dict[str, Any]]


def few_tokens(page: str) -> str:
    """The kernels for few tokens beside those for many: dispatch, combine, and both in turn."""

    def cells(found: Records, op: str) -> Row:
        pairs = [times(found[op, kind]) for kind in _KINDS if (op, kind) in found]
        return [" / ".join(us(own[p]) for own in pairs) for p in ("p50", "p99")]

    head = ("dispatch", "p99", "combine", "p99", "both in turn", "p99")
    return _table(page, "for few tokens / for many", head, cells, lambda record: True)


def late_rank(page: str) -> str:
    """The cost of a late rank for its peers, beyond its delay."""

    def cells(found: Records, op: str) -> Row:
        late = [found[op, kind]["steps"] for kind in _KINDS if (op, kind) in found]
        return [" / ".join(us(own["delayed_us"]["p50"] - own["delay_us"]) for own in late)]

    def is_late(record: dict[str, Any]) -> bool:
        return bool((record.get("steps") or {}).get("delayed_us"))

    head = ("dispatch", "combine", "both in turn")
    return _table(page, "beyond the delay: for few tokens / for many", head, cells, is_late)


def _table(
    page: str,
    title: str,
    head: Row,
    cells: Callable[[Records, str], Row],
    is_wanted: Callable[[dict[str, Any]], bool],
) -> str:
    """A line for each point, of its newest records that are wanted."""
    points: dict[tuple[Any, ...], Records] = {}
    for shape in ("decode", "decode-22"):
        for record in filter(is_wanted, pick(shape=shape, **_AT)):
            own = points.setdefault(tuple(record[k] for k in _POINT), {})
            own[record["op"], record["algorithm"]] = record
    rows: list[Row] = []
    used: list[dict[str, Any]] = []
    for point in sorted(points, key=_order):
        found = points[point]
        used += found.values()
        some = next(iter(found.values()))
        sizes = f"{some['hidden']:,}, top-{some['topk']} of {some['experts']}"
        name = f"{some['layout']}, {some['dtype']}, {sizes}"
        values = [value for op in _OPS for value in cells(found, op)]
        rows.append((name, str(some["tokens"]), *values))
    return table((title, "tokens", *head), rows) + source(used, page)


def _order(point: tuple[Any, ...]) -> tuple[Any, ...]:
    shape, layout, dtype, tokens = point
    return shape, dtype == "fp8", layout == "expert", tokens
