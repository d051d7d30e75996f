"""What a group is opened with: the caller's arguments, and what its processes agree on."""

from typing import NamedTuple

from jax_ep._src.base import tables
from jax_ep._src.base.spec import GroupSpec, Usability


class OpenArguments(NamedTuple):
    """Arguments that need no look at the environment. The names are those of Group's fields."""

    axes: tuple[str, ...]
    name: str
    num_ranks: int
    ranks_per_node: int
    num_sms: int | None
    timeout: float
    spec: GroupSpec


class Settings(NamedTuple):
    """What the processes agree on. The names are those of Group's fields."""

    backend: str
    debug: bool
    backends: dict[str, Usability]
    tuning: tables.Table
    budgets: tables.Budgets
