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
    """The table for a group: of its device kind and size, or else of any device.

    The latter: of its size or the next smaller. Entries of the file that JAX_EP_TUNING names come
    first, where it has one that fits.

    Raises: ConfigError for a file of JAX_EP_TUNING that cannot be used.
    """
    sources = [_package_entries()]
    path = config.tuning_file_from_environment()
    if path is not None:
        try:
            text = Path(path).read_text()
        except (OSError, UnicodeDecodeError) as e:
            raise ConfigError(f"JAX_EP_TUNING: cannot read {path}: {e}") from e
        sources.insert(0, _parse(text, f"JAX_EP_TUNING={path}"))
    found = (_find(entries, device_kind, num_ranks) for entries in sources)
    return next(table for table in found if table is not None)


def _package_entries() -> list[tuple[str, int, Table]]:
    text = resources.files("jax_ep").joinpath("tuning/all_reduce.json").read_text()
    return _parse(text, "the package's table")


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
            sizes = [-1 if step.bytes is None else step.bytes for step in steps[:-1]]
            if sizes != sorted(set(sizes)) or -1 in sizes:
                raise ConfigError(f"{source}: the sizes of {op} must ascend, got {sizes}")
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


def _find(entries: list[tuple[str, int, Table]], device_kind: str, num_ranks: int) -> Table | None:
    measured = [
        table for device, size, table in entries if (device, size) == (device_kind, num_ranks)
    ]
    if measured:
        return measured[-1]
    fitting = [
        (size, table)
        for device, size, table in entries
        if device == _ANY_DEVICE and size <= num_ranks
    ]
    return max(fitting, key=lambda entry: entry[0])[1] if fitting else None
