"""Failures of a group. After one, the group's end and the interpreter's exit wait for no peer."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax

from jax_ep._src.base.errors import (
    GroupInterruptedError,
    JaxEpError,
    PeerTimeoutError,
    RoutingError,
    error_of,
    program_error,
)
from jax_ep._src.base.group_spec import GroupSpec
from jax_ep._src.processes.native_group import NativeGroup
from jax_ep._src.processes.rendezvous import Rendezvous
from jax_ep._src.processes.wait import cause_of


class Failures:
    """The failures of one group, as far as this process knows them. No method waits."""

    def __init__(
        self,
        mesh: jax.sharding.Mesh,
        spec: GroupSpec,
        rendezvous: Rendezvous,
        *,
        survives: bool,
    ):
        self.native: NativeGroup | None = None  # set once it is open
        self.parts: tuple[Failures, ...] = ()  # of the groups of nodes and rails
        self._owners = [d.process_index for d in mesh.devices.flat]
        self._spec = spec
        self._rendezvous = rendezvous
        self._survives = survives
        self._bad_routings: Counter[str] = Counter()

    def add_bad_routing(self, op: str, rank: Any, num_invalid: Any, num_repeated: Any) -> None:
        """Keeps the findings of debug mode in one routing until they are raised."""
        if int(num_invalid) or int(num_repeated):
            line = (
                f"{op}: topk_idx of rank {int(rank)} holds {int(num_invalid)} ids outside "
                f"[-1, num_experts) and repeats an expert in a token {int(num_repeated)} times"
            )
            self._bad_routings[line] += 1

    def raise_known(self, problems: Sequence[Exception] = ()) -> None:
        """Raises the group's own failure, or else a ProgramError for JAX's exceptions.

        The exceptions of JAX become the cause.
        """
        failure = self.recorded()
        if not problems:
            if failure is not None:
                raise failure
            return
        cause = cause_of(problems)
        raise failure or program_error("Group.check", cause) from cause

    def recorded(self) -> JaxEpError | None:
        """Returns the first failure, or else the bad routings, which are returned only once."""
        failure = self.failure()
        if failure is not None or not self._bad_routings:
            return failure
        message = "\n".join(
            line if times == 1 else f"{line} ({times} times)"
            for line, times in self._bad_routings.items()
        )
        self._bad_routings.clear()
        return RoutingError(message)

    def failure(self) -> JaxEpError | None:
        """Returns the failure that the custom calls have recorded, or None.

        A rank that waits in one part keeps others waiting in another part. So a failure of a rank
        that nobody else's failure explains comes first.
        """
        every = (self._error_of_native(), *(part._error_of_native() for part in self.parts))
        found = [failure for failure in every if failure is not None]
        waiting = {failure.rank for failure in found if isinstance(failure, PeerTimeoutError)}
        failure = next(
            (f for f in found if not isinstance(f, PeerTimeoutError) or f.peer not in waiting),
            found[0] if found else None,
        )
        if isinstance(failure, PeerTimeoutError | GroupInterruptedError):
            self._leave_alone()
        return failure

    def _error_of_native(self) -> JaxEpError | None:
        """Returns the failure of the native group. Ranks are those of the group that was cut."""
        record = None if self.native is None else self.native.handle.error()
        if record is None:
            return None
        assert self.native is not None
        slice_ = self.native.slices[record["slice"]]
        ranks = {name: self._spec.whole_rank(slice_, record[name]) for name in ("rank", "peer")}
        return error_of({**record, **ranks})

    def loss(self) -> JaxEpError | None:
        """Returns an error for a process that has ended, even if no custom call waits for it.

        A group that survives goes on, so it has none: its calls leave the ranks of the process out.
        """
        return self._error_of(self._rendezvous.lost_process(), is_lost=True)

    def silence(self) -> JaxEpError | None:
        """Returns an error for a process that gives no sign of life, in groups over several hosts.

        A group that survives has none, as for a loss.
        """
        return self._error_of(
            self._rendezvous.silent_process(),
            place="gives no sign of life: its process, its host or the link to it may be down",
        )

    def _error_of(self, process: int | None, **how: Any) -> JaxEpError | None:
        """Returns the error for a process that others wait for in vain, or None."""
        if process is None:
            return None
        self._leave_alone()
        if self._survives:
            return None
        ranks = [position.rank for position in self._spec.positions()]
        here, there = (
            [rank for rank, owner in zip(ranks, self._owners, strict=True) if owner == p]
            for p in (jax.process_index(), process)
        )
        num_ranks = self._spec.num_ranks
        num_seen = num_ranks - len(set(there))
        return PeerTimeoutError("Group.check", here[0], there[0], num_ranks, num_seen, **how)

    def _leave_alone(self) -> None:
        """Keeps the interpreter's exit and the group's end from waiting for lost peers."""
        self._rendezvous.leave_alone_at_exit()
        for failures in (self, *self.parts):
            if failures.native is not None and not self._rendezvous.is_alone:
                failures.native.abandon()
