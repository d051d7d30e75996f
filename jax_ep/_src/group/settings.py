"""Inputs to the opening of a group: the caller's arguments, and settings that processes share."""

from typing import NamedTuple

from jax_ep._src.base import tables
from jax_ep._src.base.group_spec import GroupSpec
from jax_ep._src.base.spec import Usability
from jax_ep._src.processes.domains import Nodes


class OpenArguments(NamedTuple):
    """Arguments that do not depend on the environment. The names equal those of Group's fields.

    `ranks_per_node`: None: as the machines have it.
    """

    axes: tuple[str, ...]
    name: str
    num_ranks: int
    ranks_per_node: int | None
    num_sms: int | None
    low_latency_bytes: int
    in_flight_bytes: int
    timeout: float
    survives: bool
    spec: GroupSpec


class Settings(NamedTuple):
    """Settings on which the processes agree. The names equal those of Group's fields."""

    backend: str
    nodes: Nodes
    debug: bool
    backends: dict[str, Usability]
    tuning: tables.Table
    budgets: tables.Budgets
