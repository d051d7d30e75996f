"""A named claim about a back end."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import jax_ep

ROUND_TRIP = frozenset({"dispatch", "combine"})


@dataclass(frozen=True)
class Check:
    """One claim with its parameters; call it with a group and the name of a back end.

    Attributes:
      run: function of (group, backend, **params) that raises AssertionError.
      ops: public operations that the back end must have.
      params: plain data.
      num_staged: bytes of operands that peers read; they need room if operands are staged.
      uses_stock: whether the check also runs JAX's own collectives; NCCL refuses ranks that share a
        GPU.
      exempt: (back end, platform) for which the claim is known not to hold, and why.
    """

    run: Callable[..., None]
    ops: frozenset[str]
    params: Mapping[str, Any]
    num_staged: int = 0
    uses_stock: bool = False
    exempt: Mapping[tuple[str, str], str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The unique name of the check: its claim and its parameters."""
        given = ",".join(f"{k}={v}" for k, v in self.params.items() if v is not None)
        return f"{self.run.__name__}[{given}]"

    def __str__(self) -> str:
        return self.name

    def __call__(self, group: jax_ep.Group, backend: str) -> None:
        """Runs the check on all ranks of the group; every process of the mesh calls it.

        Raises: AssertionError if this process sees a wrong value; the operations' exceptions.
        """
        self.run(group, backend, **self.params)

    def not_usable(self, group: jax_ep.Group, backend: str) -> str | None:
        """Returns why the check cannot run on this group and back end, or None."""
        found = group.backends[backend]
        if not self.ops <= found.ops:
            return found.reason
        room = group.spec.staging_bytes
        if backend == "cuda" and room is not None and room < self.num_staged:
            return f"{self.num_staged} bytes do not fit into the {room} bytes for staged operands"
        is_halved = any(op.endswith("_send") for op in self.ops)
        if backend == "cuda" and is_halved and group.spec.in_flight_room == 0:
            return "the group was opened with in_flight_bytes=0"
        return self.exempt.get((backend, group.mesh.devices.flat[0].platform))


@contextmanager
def noted(note: str) -> Iterator[None]:
    """Adds a note to an exception that leaves the block."""
    try:
        yield
    except Exception as error:
        error.add_note(note)
        raise
