"""Sizes of the checks, and small sets of them that hold many combinations."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

import jax_ep
from jax_ep.testing import routing as routings
from jax_ep.testing.cases import DTYPES, Case, make_topk_idx, plan_of

Params = dict[str, Any]

LAYOUTS = ("rank", "expert")
FILLS = ("zeros", "padding", "none")
_BIG_ROW_BYTES = 4096

_SIZES: Params = {
    "dtype": tuple(DTYPES),
    "num_topk": (1, 2, 3, 8, 32),
    "capacity": ("ample", "exact", "short", "half", "one"),
    "row_bytes": (16, 48, 1040, 16384),
    "fill": FILLS,
    "num_biases": (0, 1, 2),
}
VALUES: dict[str, Params] = {
    "rank": _SIZES,
    "expert": {
        **_SIZES,
        "expert_alignment": (1, 2, 3, 16),
        "weights_at": (None, "rows", "tokens"),
    },
}

# Values that replace those of VALUES in the full matrix.
MORE_VALUES: Params = {
    "capacity": (*_SIZES["capacity"], "beyond"),
    "expert_alignment": (1, 2, 3, 4, 16, 32),
}


def make_case(
    group: jax_ep.Group,
    *,
    dtype: str = "bf16",
    num_topk: int = 3,
    row_bytes: int | None = None,
    capacity: str = "ample",
    **fields: Any,
) -> Case:
    """Makes a case from plain data.

    Args:
      group: the group, which gives the number of ranks.
      dtype: a key of DTYPES.
      num_topk: choices of a token. Each rank has as many experts, and at least four, so that all
        choices may go to one rank.
      row_bytes: bytes of a row; default: hidden 24.
      capacity: "ample": the worst case; "beyond": more rows than that; "exact": the rows of the
        busiest rank in the skewed routing; "short": one row less than "exact"; "half": half of
        "exact"; "one": one row, which may be less than an alignment.
      **fields: other fields of Case.
    """
    hidden = 24 if row_bytes is None else row_bytes // np.dtype(DTYPES[dtype]).itemsize
    num_tokens, num_experts = 12, num_topk
    if (row_bytes or 0) >= _BIG_ROW_BYTES:  # the rows of the worst case must fit into memory
        num_tokens, num_experts = 2, -(-num_topk // group.num_ranks)
    case = Case(
        num_ranks=group.num_ranks,
        num_tokens=num_tokens,
        num_topk=num_topk,
        experts_per_rank=max(4, num_experts),
        hidden=hidden,
        dtype=dtype,
        ranks_per_node=group.ranks_per_node,
        **fields,
    )
    if capacity == "ample":
        return case
    if capacity == "beyond":
        return replace(case, recv_capacity=case.capacity + 5)
    skewed = make_topk_idx(case, "skewed", seed_of("skewed"))
    needed = int(np.max(plan_of(case, skewed).num_recv))
    rows = {"exact": needed, "short": needed - 1, "half": needed // 2, "one": 1}[capacity]
    return replace(case, recv_capacity=max(1, rows))


def seed_of(routing: str) -> int:
    """Returns the seed of the data that the checks give a routing."""
    return list(routings.BY_NAME).index(routing)


def mix(values: Mapping[str, Sequence[Any]], *, crossed: Sequence[str] = ()) -> list[Params]:
    """Chooses few combinations of parameters that cover all pairs of values.

    Args:
      values: the values of each parameter.
      crossed: parameters of which every combination occurs.

    Returns:
      Combinations in which every value of every parameter also meets every value of every other
      parameter.
    """
    # A dict keeps its order, but a set has another order in every process.
    open_pairs = {
        (first, second): None
        for a, b in itertools.combinations(values, 2)
        for first in ((a, value) for value in values[a])
        for second in ((b, value) for value in values[b])
    }
    num_uses = {(name, value): 0 for name in values for value in values[name]}

    def complete(start: Params) -> Params:
        row = dict(start)
        for name in (n for n in values if n not in row):
            row[name] = max(
                values[name],
                key=lambda value, name=name, row=row: (  # type: ignore[misc]
                    sum(pair in open_pairs for pair in _pairs(values, {**row, name: value})),
                    -num_uses[name, value],
                ),
            )
        for pair in _pairs(values, row):
            open_pairs.pop(pair, None)
        for item in row.items():
            num_uses[item] += 1
        return {name: row[name] for name in values}

    rows = [
        complete(dict(zip(crossed, combination, strict=True)))
        for combination in itertools.product(*(values[name] for name in crossed))
    ]
    while open_pairs:
        rows.append(complete(dict(next(iter(open_pairs)))))
    return rows


def _pairs(values: Mapping[str, Sequence[Any]], row: Params) -> Iterator[tuple[Any, Any]]:
    """Returns the pairs of a combination, in the order of `values`."""
    return itertools.combinations(((name, row[name]) for name in values if name in row), 2)
