"""Which algorithm carries how many bytes: a table that is measured, not computed.

The package's own is tuning/all_reduce.json; `python -m jax_ep tune` writes another.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from jax_ep import config
from jax_ep.config import Algorithm
from jax_ep.errors import ConfigError

OPS = ("all_reduce", "reduce_scatter", "all_gather", "all_reduce_residual_rmsnorm")
_ANY_DEVICE = "any"


@dataclass(frozen=True)
class Step:
    """Up to `bytes` from each rank, `algorithm`; None: however many."""

    bytes: int | None
    algorithm: Algorithm


# Of one device kind and number of ranks, by operation; each list ends with what is unlimited.
Table = Mapping[str, Sequence[Step]]


def pick(table: Table, op: str, num_bytes: int, allowed: Sequence[Algorithm]) -> Algorithm | None:
    """The table's choice among the allowed ones; None if it has none for so many bytes."""
    for step in table[op]:
        if (step.bytes is None or num_bytes <= step.bytes) and step.algorithm in allowed:
            return step.algorithm
    return None


def load(device_kind: str, num_ranks: int) -> Table:
    """The table for a group: of its size or the next smaller, of its device kind if there is one.

    Raises: ConfigError for a file of JAX_EP_TUNING that cannot be used.
    """
    path = config.tuning_file_from_environment()
    if path is None:
        text = resources.files("jax_ep").joinpath("tuning/all_reduce.json").read_text()
        return _find(_parse(text, "the package's table"), device_kind, num_ranks)
    try:
        text = Path(path).read_text()
    except OSError as e:
        raise ConfigError(f"JAX_EP_TUNING: cannot read {path}: {e}") from e
    return _find(_parse(text, f"JAX_EP_TUNING={path}"), device_kind, num_ranks)


def to_plain(table: Table) -> dict[str, list[list[Any]]]:
    """As JSON has it."""
    return {op: [[s.bytes, s.algorithm.name.lower()] for s in table[op]] for op in table}


def _parse(text: str, source: str) -> list[tuple[str, int, Table]]:
    try:
        entries = [_entry(plain) for plain in json.loads(text)["tables"]]
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise ConfigError(f"{source} is no table of algorithms: {type(e).__name__}: {e}") from e
    for _, _, table in entries:
        for op, steps in table.items():
            if not steps or steps[-1].bytes is not None:
                raise ConfigError(f"{source}: the last entry of {op} must be for any size (null)")
    return entries


def _entry(plain: Any) -> tuple[str, int, Table]:
    device, num_ranks, ops = plain["device"], plain["num_ranks"], plain["ops"]
    if not isinstance(device, str):
        raise TypeError(f"device must be a string, got {device!r}")
    if not _is_whole(num_ranks):
        raise TypeError(f"num_ranks must be a whole number, got {num_ranks!r}")
    return device, num_ranks, {op: [_step(pair) for pair in ops[op]] for op in OPS}


def _step(pair: Any) -> Step:
    num_bytes, algorithm = pair
    if num_bytes is not None and not _is_whole(num_bytes):
        raise TypeError(f"bytes must be a whole number or null, got {num_bytes!r}")
    return Step(num_bytes, Algorithm[algorithm.upper()])


def _is_whole(value: Any) -> bool:
    # Not isinstance: true is no number.
    return type(value) is int and value >= 0


def _find(entries: list[tuple[str, int, Table]], device_kind: str, num_ranks: int) -> Table:
    fitting = [
        (size, device == device_kind, table)
        for device, size, table in entries
        if size <= num_ranks and device in (device_kind, _ANY_DEVICE)
    ]
    if fitting:
        return max(fitting, key=lambda entry: entry[:2])[2]
    raise ConfigError(f"the table of algorithms has none for {device_kind}, {num_ranks} ranks")
