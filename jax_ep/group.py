"""Group: the ranks that exchange rows, and everything they own."""

import atexit
import os
import warnings
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Self

import jax

from jax_ep import (
    _backends,
    _bootstrap,
    _group_info,
    _interrupts,
    _jax_compat,
    _native,
    _native_group,
    _open_arguments,
    _registry,
    _self_test,
    _tuning,
    config,
)
from jax_ep._backends import Usability
from jax_ep._group_info import GroupInfo
from jax_ep._native_group import NativeGroup
from jax_ep._settle import arrays_in, cause_of, excuse_failures, live_arrays, settle, wait
from jax_ep._spec import GroupSpec
from jax_ep.errors import (
    GroupError,
    GroupInterruptedError,
    JaxEpError,
    PeerTimeoutError,
    RoutingError,
    error_of,
    program_error,
)

__all__ = ["Group", "GroupInfo"]


@dataclass(eq=False, repr=False)
class Group:
    """The ranks along one or more mesh axes that exchange rows with each other.

    Open one with `Group.open`, use it as a context manager, pass it to the operations as `group=`.
    One group covers all slices of the mesh along the other axes. Compiled functions keep what they
    need alive: they may run after `close()`, but nothing new can be traced with a closed group.

    Attributes:
      mesh: as it was opened over.
      axes: the mesh axes that the ranks run along.
      name: tells apart groups over the same mesh and axes.
      num_ranks: ranks of one slice.
      ranks_per_node: ranks of one node.
      num_sms: SMs that all dispatches and combines use on GPUs unless they say otherwise; None:
        `budgets` say it by operation and layout.
      backend: the back end in use.
      timeout: seconds that a rank waits for its peers.
      debug: whether routings are checked on the device.
      identity: name and fingerprint, equal in every process.
      spec, backends, tuning, budgets: for the operations; `info()` tells what a user wants to know
        of them.
    """

    mesh: jax.sharding.Mesh
    axes: tuple[str, ...]
    name: str
    num_ranks: int
    ranks_per_node: int
    num_sms: int | None
    backend: str
    timeout: float
    debug: bool
    spec: GroupSpec
    backends: dict[str, Usability]
    tuning: _tuning.Table
    budgets: _tuning.Budgets
    _meeting: _bootstrap.Meeting
    _native_group: NativeGroup | None = None
    _is_open: bool = True
    _bad_routings: Counter[str] = field(default_factory=Counter)
    _pid: int = field(default_factory=os.getpid)

    @classmethod
    def open(
        cls,
        mesh: jax.sharding.Mesh,
        axis: str | tuple[str, ...],
        *,
        name: str | None = None,
        backend: str = "auto",
        timeout: float = config.DEFAULT_TIMEOUT_S,
        num_sms: int | None = None,
        ranks_per_node: int | None = None,
        debug: bool | None = None,
    ) -> Self:
        """Opens a group over the devices of a mesh.

        Args:
          mesh: the mesh that the program's `jax.shard_map` uses, devices included.
          axis: the axis, or axes, that the ranks run along; rank = row-major index over them.
          name: tells apart groups over the same mesh and axes; default: the axes, joined by "_".
          backend: "auto", "cpu" (host twins), "cuda" (kernels) or "xla" (stock collectives). What
            "auto" chose, and why, is in `info()`. With it, and without num_sms, `xla` carries an
            operation in a layout of which the table of this device says that it is faster so.
          timeout: seconds that a call of the custom calls waits for a rank before the group fails.
            The `xla` back end waits as XLA's collectives do. Default: 60; at most a day. Over
            several processes it should be below JAX's heartbeat timeout.
          num_sms: SMs that every dispatch and combine of the `cuda` back end uses unless it says
            otherwise; default: what a table says of this device and number of ranks, by operation
            and layout, from 16 to 64 in the package's (`info().budgets`). Fewer leave more to
            compute that runs beside it. all_reduce and its relatives take up to 64.
          ranks_per_node: ranks of one node, consecutive; default: all.
          debug: counts bad ids of every routing and raises them in `check()`; default: the
            environment variable JAX_EP_DEBUG.

        Returns:
          The open group, after a self-test that moved data between every pair of ranks.

        Collective: every process of the mesh opens it, with the same arguments.
        Raises: ConfigError; GroupError, also where the processes disagree or run different builds,
          or one does not come within `timeout`; PeerTimeoutError where one that came is lost. What
          fails in one process is raised in all of them.
        Warns: where "auto" falls back to stock collectives on CPUs or GPUs, with the reason; the
          first process of the mesh does.
        Source: DeepEP's Buffer (DeepSeek, 2025), with the mesh in the place of a process group.
        """
        arguments = _open_arguments.check(
            mesh,
            axis,
            name=name,
            timeout=timeout,
            num_sms=num_sms,
            ranks_per_node=ranks_per_node,
        )
        identity, seconds = arguments.spec.identity, arguments.timeout
        slices = [seat.slice for seat in arguments.spec.seats()]
        with (
            ExitStack() as undo,
            _bootstrap.meet(mesh, identity, slices, timeout=seconds) as meeting,
        ):
            if identity in _registry.open_groups:
                raise GroupError(
                    f"Group.open: a group named {arguments.name!r} over the same axes and devices "
                    "is open; pass another name="
                )
            debug = config.debug_from_environment() if debug is None else debug
            kind = mesh.devices.flat[0].device_kind, arguments.num_ranks
            tuning = _tuning.load(*kind)
            budgets = _tuning.load_budgets(
                *kind, num_sms=arguments.num_sms, is_auto=backend == "auto"
            )
            # In front of all else: other builds may have other settings.
            meeting.agree("builds", _native.builds({d.platform for d in mesh.devices.flat}))
            meeting.agree(
                "settings",
                {
                    "backend": backend,
                    **{f"the table of {op}": s for op, s in _tuning.to_plain(tuning).items()},
                    "num_sms": arguments.num_sms,
                    **{f"the budgets of {op}": b for op, b in budgets.to_plain().items()},
                    "ranks_per_node": arguments.ranks_per_node,
                    "timeout": seconds,
                    "debug": debug,
                },
            )
            meeting.connect(reads_memory=all(d.platform == "cpu" for d in mesh.devices.flat))
            chosen, usability = _backends.resolve(
                mesh, arguments.num_ranks, backend, meeting.why_not_linked
            )
            complete = sorted(b for b, u in usability.items() if _backends.is_complete(u))
            meeting.agree("back ends", {"the back ends that are usable": complete})
            group = cls(
                mesh=mesh,
                **arguments._asdict(),
                backend=chosen,
                debug=debug,
                backends=usability,
                tuning=tuning,
                budgets=budgets,
                _meeting=meeting,
            )
            undo.callback(group._discard)
            group._start(is_wanted=backend == chosen)
            undo.pop_all()
        if backend == "auto":
            group._warn_of_fallback()
        return group

    @property
    def identity(self) -> str:
        """Name and fingerprint: what compiled code and handles carry, equal in every process."""
        return self.spec.identity

    def _warn_of_fallback(self) -> None:
        """In one process: the reason is the same in all of them."""
        why_not = _backends.why_no_custom_calls(self.mesh, self.backends)
        if why_not is not None and self._meeting.processes[0] == jax.process_index():
            warnings.warn(
                f"Group.open: group {self.identity} runs on stock collectives, back end 'xla': "
                f"{why_not}",
                stacklevel=3,
            )

    def _start(self, *, is_wanted: bool) -> None:
        """`is_wanted`: the caller has named the back end, and takes no other."""
        if self.backends["cuda"].ops:
            _native.register("cuda")
        for backend in ("cpu", "cuda"):
            if _backends.is_complete(self.backends[backend]):
                self._open_native(backend, is_wanted=is_wanted)
        self._watch_interrupts()
        _registry.open_groups[self.identity] = self
        # In the self-test ranks wait for one another where nobody can tell them of a failure.
        self.wait_for_all("native half")
        _self_test.run(self)
        self.wait_for_all("self-test")

    def wait_for_all(self, step: str) -> None:
        """While the group opens: until all processes have come so far, or one has failed."""
        self._meeting.gather(step, None)

    def _open_native(self, backend: str, *, is_wanted: bool) -> None:
        opening = _native_group.Opening(self.mesh, self.spec, self._meeting, self.timeout)
        opened = opening.open_cpu() if backend == "cpu" else opening.open_cuda()
        if not isinstance(opened, str):
            self._native_group = opened
            self.spec = replace(
                self.spec, staging_bytes=opened.staging_bytes, has_packets=opened.has_packets
            )
            return
        why_not = f"the processes cannot map one another's memory: {opened}"
        if self.backend == backend and is_wanted:
            raise GroupError(f"Group.open: back end {backend!r} is not usable here: {why_not}")
        self.backends = _backends.without_exchange(self.backends, backend, why_not)
        if self.backend == backend:
            self.backend = "xla"

    def close(self) -> None:
        """Ends the group. Compiled functions that use it may still run; idempotent.

        Collective: no; over several processes the others may go on, but not with what this one's
        ranks take part in.
        """
        if not self._is_open:
            return
        self._is_open = False
        _registry.open_groups.pop(self.identity, None)
        if self._is_inherited():  # the parent uses it, and its threads are not here
            if self._native_group is not None:
                self._native_group.abandon()
            return
        if self._native_group is not None:
            self._native_group.close(self.spec)
        self._meeting.close()

    def _is_inherited(self) -> bool:
        """Whether this is a forked child of the process that opened the group."""
        return os.getpid() != self._pid

    def _require_own_process(self, op: str) -> None:
        if self._is_inherited():
            raise GroupError(
                f"{op}: process {self._pid} opened group {self.identity}; its forked child "
                f"{os.getpid()} cannot use it"
            )

    def _discard(self) -> None:
        """After a failure to open: all is freed now, not with the exception that refers to it."""
        self.close()
        self._native_group = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if self._is_inherited():
                return
            if error is None:
                self.check()
                return
            if isinstance(error, Exception | KeyboardInterrupt):
                # The others may wait in their calls for what this process does no more.
                self._meeting.leave_alone_at_exit()
                self._loss()
                excuse_failures(error, self._devices())
            if (failure := self._recorded()) is not None and str(failure) != str(error):
                # It may be why: a failed call gives NaNs.
                error.add_note(f"group {self.identity}: {type(failure).__name__}: {failure}")
        finally:
            self.close()

    def __repr__(self) -> str:
        state = "" if self._is_open else ", closed"
        return f"Group({self.identity}, {self.num_ranks} ranks, backend={self.backend!r}{state})"

    def info(self) -> GroupInfo:
        """Who is in the group and what it runs on. Collective: no."""
        return _group_info.describe(self, self._native_group)

    def check(self, *results: Any) -> None:
        """Raises what went wrong on a device: a peer that did not come, a bad routing.

        A device never raises by itself: an error on one device would leave the others waiting in
        XLA's collectives until the process is aborted. It ends its call with NaN instead, and the
        record is raised here, when the `with` block ends, and at the next trace.

        Args:
          *results: arrays, or pytrees of them, of the launches to look at; they are waited for.
            Without any, every live array on the group's devices is.

        A deleted or donated array is nothing to wait for.

        Collective: no.
        Raises: PeerTimeoutError, GroupError, at every call from then on; RoutingError (debug mode),
          once; ProgramError, from what JAX raised, where a program failed otherwise: at every call
          that is given its results, once at those without any.
        """
        self._require_own_process("Group.check")
        arrays = arrays_in(results) if results else live_arrays(self._devices())
        self._watch_interrupts()
        problems = self._wait(arrays) + _jax_compat.wait_for_effects()
        self._raise_record(problems)
        _interrupts.survive()

    def wait_for_results(self, *results: Any) -> None:
        """The same for results alone: what programs before have failed with is left to others."""
        self._raise_record(self._wait(arrays_in(results)))

    def _wait(self, arrays: list[jax.Array]) -> list[Exception]:
        """What JAX raises for the arrays."""
        if self._meeting.is_alone:
            return wait(arrays)
        return settle(arrays, failure=self._failure, loss=self._loss, timeout=self.timeout)

    def _watch_interrupts(self) -> None:
        """Or watches them again, where somebody has set a handler since."""
        if self._native_group is not None:
            _interrupts.watch()

    def _devices(self) -> set[jax.Device]:
        return set(self.mesh.devices.flat)

    def _raise_record(self, problems: Sequence[Exception] = ()) -> None:
        """Raises the group's own failure, or else what JAX raised; whatever that was, behind it."""
        failure = self._recorded()
        if not problems:
            if failure is not None:
                raise failure
            return
        cause = cause_of(problems)
        raise failure or program_error("Group.check", cause) from cause

    def _recorded(self) -> JaxEpError | None:
        """What went wrong as far as is known now, without waiting for anything."""
        failure = self._failure()
        if failure is not None or not self._bad_routings:
            return failure
        message = "\n".join(
            line if times == 1 else f"{line} ({times} times)"
            for line, times in self._bad_routings.items()
        )
        self._bad_routings.clear()
        return RoutingError(message)

    def _failure(self) -> JaxEpError | None:
        """The record of the custom calls."""
        native = self._native_group
        record = native.handle.error() if native is not None else None
        if record is None:
            return None
        failure = error_of(record)
        if isinstance(failure, PeerTimeoutError | GroupInterruptedError):
            self._leave_alone()
        return failure

    def _leave_alone(self) -> None:
        """A peer may be lost, or will be: no end waits for it, the interpreter's or the group's."""
        self._meeting.leave_alone_at_exit()
        if self._native_group is not None and not self._meeting.is_alone:
            self._native_group.abandon()

    def leave_alone_now(self) -> None:
        """At the exit of the interpreter, which would wait for the other processes."""
        self._meeting.leave_alone_now()

    def _loss(self) -> JaxEpError | None:
        """A process that has ended, though no custom call has waited for it."""
        process = self._meeting.lost_process()
        if process is None:
            return None
        self._leave_alone()
        owners = [d.process_index for d in self.mesh.devices.flat]
        ranks = [seat.rank for seat in self.spec.seats()]
        here, there = (
            [rank for rank, owner in zip(ranks, owners, strict=True) if owner == p]
            for p in (jax.process_index(), process)
        )
        num_seen = self.num_ranks - len(set(there))
        return PeerTimeoutError(
            "Group.check", here[0], there[0], self.num_ranks, num_seen, is_lost=True
        )

    def require_traceable(self, op: str) -> None:
        """Raises unless `op` may be traced here with this group."""
        if not self._is_open:
            raise GroupError(f"{op}: group {self.identity} is closed")
        self._require_own_process(op)
        self._raise_record()
        manual = _jax_compat.manual_axes()
        missing = [a for a in self.axes if a not in manual]
        if missing:
            found = ", ".join(manual) or "none"
            raise GroupError(
                f"{op}: group {self.identity} runs along axis {', '.join(self.axes)}: call it "
                f"inside jax.shard_map over the group's mesh; manual axes here: {found}"
            )
        automatic = _jax_compat.automatic_axes()
        if automatic:
            raise GroupError(
                f"{op}: every axis of the mesh must be manual in jax.shard_map; automatic here: "
                f"{', '.join(automatic)}"
            )
        expected = {name: size for name, size in self.spec.mesh_axes if size > 1}
        got = {name: size for name, size in manual.items() if size > 1}
        if expected != got:
            raise GroupError(
                f"{op}: group {self.identity} was opened over the mesh {expected}, "
                f"but runs inside jax.shard_map over {got}"
            )

    def report_bad_routing(self, op: str, rank: Any, num_invalid: Any, num_repeated: Any) -> None:
        """Keeps what debug mode found in one routing until `check()`."""
        if int(num_invalid) or int(num_repeated):
            line = (
                f"{op}: topk_idx of rank {int(rank)} holds {int(num_invalid)} ids outside "
                f"[-1, num_experts) and repeats an expert in a token {int(num_repeated)} times"
            )
            self._bad_routings[line] += 1


atexit.register(_interrupts.end_program)
