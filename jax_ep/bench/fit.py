"""Computes the fitted constants of `jax_ep.bench.model` again, from records and published rows."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jax_ep.bench import model
from jax_ep.bench.published import Published

Points = Sequence[tuple[float, float]]


def fit_line(points: Points) -> tuple[float, float]:
    """The line (start, slope) through (x, y) with the least squares of relative errors."""
    weights = [1 / y**2 for _, y in points]
    total = sum(weights)
    mean_x = sum(w * x for w, (x, _) in zip(weights, points, strict=True)) / total
    mean_y = sum(w * y for w, (_, y) in zip(weights, points, strict=True)) / total
    spread = sum(w * (x - mean_x) ** 2 for w, (x, _) in zip(weights, points, strict=True))
    joint = sum(w * (x - mean_x) * (y - mean_y) for w, (x, y) in zip(weights, points, strict=True))
    slope = joint / spread
    return mean_y - slope * mean_x, slope


def exchange_of(record: Mapping[str, Any]) -> model.Exchange:
    """Sizes of a record of `python -m jax_ep bench`, within one node."""
    names = ("tokens", "hidden", "topk", "experts", "dtype")
    ranks = record["num_ranks"]
    return model.Exchange(
        num_ranks=ranks, ranks_per_node=ranks, **{name: record[name] for name in names}
    )


def fit_ours(
    records: Iterable[Mapping[str, Any]], op: str, mode: str, nvlink: float
) -> tuple[float, float]:
    """Launch and share of NVLink of our kernel, from records of it on two ranks."""
    kernel = model.OURS[mode, op]
    points = [(model.traffic(kernel, exchange_of(r)).nvlink_bytes, r["us"]["p50"]) for r in records]
    launch, us_per_byte = fit_line(points)
    return launch, 1 / (us_per_byte * nvlink * 1e3)


def fit_share(rows: Sequence[Published]) -> float:
    """Share of a NIC's bandwidth, the mean of rows whose time is that of the network."""
    shares = []
    for row in rows:
        kernel = model.theirs(row.op, row.mode, row.rows)
        moved = model.traffic(kernel, row.exchange).network_bytes
        rate = moved / ((row.us - kernel.launch_us) * 1e3)
        shares.append(rate / model.MACHINES[row.machine].nic)
    return sum(shares) / len(shares)


def fit_start(rows: Sequence[Published], share: float) -> tuple[float, float]:
    """Start-up of the network and time of a flag, from rows of few tokens; no time is below 0."""
    points = []
    for row in rows:
        kernel = model.theirs(row.op, row.mode, row.rows)
        moved = model.traffic(kernel, row.exchange)
        moving = moved.network_bytes / (model.MACHINES[row.machine].nic * share * 1e3)
        rest = row.us - kernel.launch_us - moving
        points.append((float(moved.network_flags + moved.nvlink_flags), rest))
    mean_x, mean_y = (sum(values) / len(points) for values in zip(*points, strict=True))
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / sum(
        (x - mean_x) ** 2 for x, _ in points
    )
    return (mean_y - slope * mean_x, slope) if slope > 0 else (mean_y, 0.0)
