"""Tables of measured choices: algorithms by bytes, and SMs by exchange and layout.

The package's own tables are in tables.json. `python -m jax_ep tune` writes others.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from jax_ep._src.base import config
from jax_ep._src.base.errors import ConfigError
from jax_ep._src.base.operations import OPERATIONS
from jax_ep._src.base.options import Algorithm, Layout
from jax_ep._src.base.spec import Routes

OPS = tuple(op.name for op in OPERATIONS if op.has_algorithms)
EXCHANGES = Routes._fields
_ANY_DEVICE = "any"


@dataclass(frozen=True)
class Step:
    """A row of a table: `algorithm` serves up to `bytes` from each rank; None: any number."""

    bytes: int | None
    algorithm: Algorithm


# Steps by operation, for one device kind and number of ranks. The last step of each is unlimited.
Table = Mapping[str, Sequence[Step]]


class Budget(NamedTuple):
    """The resources that one exchange in one layout uses.

    Attributes:
      sms: SMs of a GPU, on the `cuda` back end.
      backend: back end that "auto" takes in place of the group's; None: the group's.
    """

    sms: int
    backend: str | None = None


@dataclass(frozen=True)
class Budgets:
    """The budgets of a group.

    Attributes:
      of: the budget of every exchange and layout.
      source: their origin in words.
    """

    of: Mapping[str, Mapping[Layout, Budget]]
    source: str

    def to_plain(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Returns the budgets in JSON's types."""
        return {
            exchange: {layout.value: _plain_budget(b) for layout, b in layouts.items()}
            for exchange, layouts in self.of.items()
        }


@dataclass(frozen=True)
class _Entry:
    """The entry of a file for one device kind and number of ranks; either part may be absent."""

    file: str
    device: str
    num_ranks: int
    table: Table | None
    budgets: Budgets | None


def pick(table: Table, op: str, num_bytes: int, allowed: Sequence[Algorithm]) -> Algorithm | None:
    """Returns the table's choice among `allowed`; None if the table allows none at this size."""
    for step in table[op]:
        if (step.bytes is None or num_bytes <= step.bytes) and step.algorithm in allowed:
            return step.algorithm
    return None


def load(device_kind: str, num_ranks: int) -> Table:
    """Returns the table of algorithms for a group.

    The best entry has the group's device kind and size. The next best is for any device, and has
    the group's size or the next smaller one. If the file that JAX_EP_TUNING names has an entry
    that fits, it is used before the package's.

    Raises: ConfigError for a file of JAX_EP_TUNING that cannot be used.
    """
    return _first(_files(), lambda entry: entry.table, device_kind, num_ranks)[1]


def load_budgets(
    device_kind: str, num_ranks: int, *, num_sms: int | None = None, is_auto: bool = True
) -> Budgets:
    """Returns the budgets of a group, found like its table of algorithms.

    Args:
      device_kind: kind of the group's devices.
      num_ranks: ranks of one slice.
      num_sms: argument of Group.open. If given, every exchange uses it and the group's back end.
      is_auto: whether "auto" chose the group's back end. Budgets do not overrule a named back end.

    Raises: ConfigError for a file of JAX_EP_TUNING that cannot be used.
    """
    entry, found = _first(_files(), lambda entry: entry.budgets, device_kind, num_ranks)
    if num_sms is not None:
        return Budgets(_map(found.of, lambda _: Budget(num_sms)), "num_sms of Group.open")
    if not is_auto:
        found = replace(found, of=_map(found.of, lambda b: Budget(b.sms)))
    ranks = f"{entry.num_ranks} rank{'s' if entry.num_ranks > 1 else ''}"
    device = "any device, from" if entry.device == _ANY_DEVICE else f"{entry.device},"
    return replace(found, source=f"{entry.file}, {device} {ranks}: {found.source}")


def to_plain(table: Table) -> dict[str, list[list[Any]]]:
    """Returns the table in JSON's types."""
    return {op: [[s.bytes, s.algorithm.value] for s in table[op]] for op in table}


def _map(
    of: Mapping[str, Mapping[Layout, Budget]], change: Callable[[Budget], Budget]
) -> dict[str, dict[Layout, Budget]]:
    return {
        exchange: {layout: change(budget) for layout, budget in layouts.items()}
        for exchange, layouts in of.items()
    }


# --- files


def _files() -> list[list[_Entry]]:
    """Returns the entries of JAX_EP_TUNING's file, if there is one, then the package's."""
    text = resources.files("jax_ep._src.base").joinpath("tables.json").read_text()
    files = [_parse(text, "the package's table")]
    path = config.tuning_file_from_environment()
    if path is not None:
        try:
            text = Path(path).read_text()
        except (OSError, UnicodeDecodeError) as e:
            raise ConfigError(f"JAX_EP_TUNING: cannot read {path}: {e}") from e
        files.insert(0, _parse(text, f"JAX_EP_TUNING={path}"))
    return files


_Part = TypeVar("_Part")


def _first(
    files: Sequence[Sequence[_Entry]],
    part_of: Callable[[_Entry], _Part | None],
    device_kind: str,
    num_ranks: int,
) -> tuple[_Entry, _Part]:
    """Returns the entry that serves a group, and its part, from the first file that has one."""
    for entries in files:
        parts = [(entry, part) for entry in entries if (part := part_of(entry)) is not None]
        own = [p for p in parts if (p[0].device, p[0].num_ranks) == (device_kind, num_ranks)]
        if own:
            return own[-1]
        fitting = [p for p in parts if p[0].device == _ANY_DEVICE and p[0].num_ranks <= num_ranks]
        if fitting:
            return max(fitting, key=lambda p: p[0].num_ranks)
    raise AssertionError("the package's table has an entry for any device from one rank on")


def _parse(text: str, file: str) -> list[_Entry]:
    try:
        entries = [_entry(plain, file) for plain in json.loads(text)["tables"]]
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise ConfigError(f"{file} is no table of algorithms: {type(e).__name__}: {e}") from e
    for entry in entries:
        for op, steps in (entry.table or {}).items():
            if not steps or steps[-1].bytes is not None:
                raise ConfigError(f"{file}: the last entry of {op} must be for any size (null)")
            sizes = [-1 if step.bytes is None else step.bytes for step in steps[:-1]]
            if sizes != sorted(set(sizes)) or -1 in sizes:
                raise ConfigError(f"{file}: the sizes of {op} must ascend, got {sizes}")
    return entries


def _entry(plain: Any, file: str) -> _Entry:
    device, num_ranks = plain["device"], plain["num_ranks"]
    if not isinstance(device, str):
        raise TypeError(f"device must be a string, got {device!r}")
    if not _is_whole(num_ranks):
        raise TypeError(f"num_ranks must be a whole number, got {num_ranks!r}")
    budgets = plain.get("budgets")
    # Older files have `ops` alone. A file may also have `budgets` alone.
    ops = plain["ops"] if budgets is None else plain.get("ops")
    return _Entry(
        file=file,
        device=device,
        num_ranks=num_ranks,
        table=None if ops is None else {op: [_step(pair) for pair in ops[op]] for op in OPS},
        budgets=None if budgets is None else _budgets(budgets),
    )


def _step(pair: Any) -> Step:
    num_bytes, algorithm = pair
    if num_bytes is not None and not _is_whole(num_bytes):
        raise TypeError(f"bytes must be a whole number or null, got {num_bytes!r}")
    return Step(num_bytes, Algorithm(algorithm))


def _budgets(plain: Any) -> Budgets:
    source = plain["source"]
    if not isinstance(source, str):
        raise TypeError(f"source must be a string, got {source!r}")
    of = {
        exchange: {layout: _budget(plain[exchange][layout.value]) for layout in Layout}
        for exchange in EXCHANGES
    }
    return Budgets(of, source)


def _budget(plain: Any) -> Budget:
    sms, backend = plain["sms"], plain.get("backend")
    if not _is_whole(sms) or sms < 1:
        raise TypeError(f"sms must be a positive whole number, got {sms!r}")
    if backend not in (None, "xla"):
        raise ValueError(f"backend of a budget must be 'xla' or left out, got {backend!r}")
    return Budget(sms, backend)


def _plain_budget(budget: Budget) -> dict[str, Any]:
    return {name: value for name, value in budget._asdict().items() if value is not None}


def _is_whole(value: Any) -> bool:
    # isinstance would let true pass as a number.
    return type(value) is int and value >= 0
