"""Published times of other libraries, and how far `jax_ep.bench.model` is from them."""

import csv
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

from jax_ep.bench import model

# Bytes that a published GB/s counts: a row for each of the token's experts, ranks or nodes, the
# own rank or node among them. What crosses a link is less.
_COUNTED: Mapping[str, Callable[[model.Exchange], float]] = {
    "EXPERT_ROWS": lambda e: e.topk,
    "RANK_ROWS_INCL": model.Exchange.ranks_of_a_token,
    "NODE_ROWS_INCL": model.Exchange.nodes_of_a_token,
}


class Published(NamedTuple):
    """One published number.

    Attributes:
      system, machine: who was measured, and on a key of MACHINES.
      exchange, mode, op, rows: what was measured, and what crosses in it.
      value, unit, counts: microseconds, or GB/s of bytes that `counts` defines.
      fitted: the constant of the model that this row was used for, if any.
      source, note: where the number is from, and what is to say about it.
    """

    system: str
    machine: str
    exchange: model.Exchange
    mode: str
    op: str
    rows: model.Rows
    value: float
    unit: str
    counts: str
    fitted: str
    source: str
    note: str

    @property
    def us(self) -> float:
        """Microseconds; of a rate, those in which the bytes that it counts cross."""
        if self.unit == "us":
            return self.value
        rows = self.exchange.tokens * _COUNTED[self.counts](self.exchange)
        return rows * self.exchange.row_bytes / (self.value * 1e3)

    @property
    def predicted(self) -> model.Prediction:
        """What the model says."""
        kernel = model.theirs(self.op, self.mode, self.rows)
        return model.predict(kernel, self.exchange, model.MACHINES[self.machine])

    @property
    def error(self) -> float:
        """Of the prediction, relative; positive: it predicts more time than was published."""
        return self.predicted.us / self.us - 1


def read_published(path: Path) -> list[Published]:
    """Reads a table in the form of benchmarks/published.csv."""
    with path.open(newline="") as file:
        return [_parse(line) for line in csv.DictReader(file)]


def _parse(line: dict[str, str]) -> Published:
    exchange = model.Exchange(
        num_ranks=int(line["ranks"]),
        ranks_per_node=int(line["ranks_per_node"]),
        tokens=int(line["tokens"]),
        hidden=int(line["hidden"]),
        topk=int(line["topk"]),
        experts=int(line["experts"]),
        max_nodes=int(line["max_nodes"]) if line["max_nodes"] else None,
        dtype=line["dtype"],
    )
    return Published(
        system=line["system"],
        machine=line["machine"],
        exchange=exchange,
        mode=line["mode"],
        op=line["op"],
        rows=model.Rows(line["rows"]),
        value=float(line["value"]),
        unit=line["unit"],
        counts=line["counts"],
        fitted=line["fitted"],
        source=line["source"],
        note=line["note"],
    )


class Errors(NamedTuple):
    """Errors of some rows: how many there are, and medians of them and of their sizes."""

    num_rows: int
    median: float
    median_size: float
    largest: float


def summarize(rows: Sequence[Published]) -> Errors:
    """Sums up the errors of rows; there must be one at least."""
    errors = [row.error for row in rows]
    sizes = [abs(error) for error in errors]
    return Errors(len(rows), median(errors), median(sizes), max(errors, key=abs))


def group(rows: Sequence[Published]) -> dict[tuple[str, str, str], list[Published]]:
    """Rows by system, network ("NVLink" within a node) and mode."""
    groups: dict[tuple[str, str, str], list[Published]] = {}
    for row in rows:
        is_near = row.exchange.num_nodes == 1
        network = "NVLink" if is_near else model.MACHINES[row.machine].network
        groups.setdefault((row.system, network, row.mode), []).append(row)
    return groups
