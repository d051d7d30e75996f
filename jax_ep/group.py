"""Group: the ranks that exchange rows, and everything they own."""

import atexit
import os
import warnings
from contextlib import ExitStack
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

import jax

from jax_ep import (
    _backends,
    _bootstrap,
    _group_info,
    _interrupts,
    _jax_compat,
    _lookup,
    _native,
    _native_group,
    _open_arguments,
    _registry,
    _self_test,
    _settings,
    _tuning,
    config,
)
from jax_ep._backends import Usability
from jax_ep._failures import Failures
from jax_ep._group_info import GroupInfo
from jax_ep._native_group import NativeGroup
from jax_ep._open_arguments import OpenArguments
from jax_ep._settings import Settings
from jax_ep._settle import arrays_in, excuse_failures, live_arrays, settle, wait
from jax_ep._shard_map import require_mesh_of
from jax_ep._spec import GroupSpec
from jax_ep.errors import GroupError

__all__ = ["Group", "GroupInfo"]


class Group:
    """The ranks along one or more mesh axes that exchange rows with each other.

    Open one with `Group.open`, use it as a context manager, pass it to the operations as `group=`.
    `Group.get` finds it again, or opens it where it is needed. `copy.copy` and `copy.deepcopy` give
    the group itself; a pickle of it finds the open group of the same identity where it is loaded.
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

    def __init__(
        self,
        mesh: jax.sharding.Mesh,
        arguments: OpenArguments,
        settings: Settings,
        meeting: _bootstrap.Meeting,
    ):
        """Not for users, who call `Group.open` or `Group.get`."""
        self.mesh = mesh
        self.axes = arguments.axes
        self.name = arguments.name
        self.num_ranks = arguments.num_ranks
        self.ranks_per_node = arguments.ranks_per_node
        self.num_sms = arguments.num_sms
        self.timeout = arguments.timeout
        self.spec = arguments.spec
        self.backend = settings.backend
        self.debug = settings.debug
        self.backends = settings.backends
        self.tuning = settings.tuning
        self.budgets = settings.budgets
        self._meeting = meeting
        self._native_group: NativeGroup | None = None
        self._failures = Failures(mesh, self.spec, meeting)
        self._is_open = True
        self._pid = os.getpid()
        _registry.groups.add(self)

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
            backend=backend,
            timeout=timeout,
            num_sms=num_sms,
            ranks_per_node=ranks_per_node,
            debug=debug,
            op="Group.open",
        )
        with _registry.opening(arguments.spec.identity):
            return cls._open(mesh, arguments, backend=backend, debug=debug)

    @classmethod
    def get(
        cls,
        mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh | None = None,
        axis: str | tuple[str, ...] | None = None,
        *,
        name: str | None = None,
        backend: str = "auto",
        timeout: float | None = None,
        num_sms: int | None = None,
        ranks_per_node: int | None = None,
        debug: bool | None = None,
    ) -> "Group":
        """The open group over a mesh and axis; opens it where there is none, or none any more.

        For layers that learn their mesh when they are called, for cells of a notebook that run
        twice, for models that outlive a group. It may be called while JAX traces, also in the body
        of a `jax.shard_map`. Whoever closes the group closes it for all who have it.

        Args:
          mesh: as for `Group.open`. None: that of `jax.set_mesh`, or of the enclosing
            `jax.shard_map`. Under jit the latter is known without its devices, as every
            `AbstractMesh` is: then it is the mesh of `jax.set_mesh`, or else that of the open
            groups, which has the same axes and sizes.
          axis: as for `Group.open`. None: the only axis of the mesh.
          name: as for `Group.open`. A group of another name is another group, and left alone.
          backend: what the group must have in use; "auto": whatever it has.
          timeout: what it must have been opened with; None: whatever it was.
          num_sms: the same.
          ranks_per_node: the same.
          debug: the same.

        A group that is opened has these settings, and the defaults of `Group.open` for those that
        are "auto" or None; what an earlier group had, which was closed, does not matter.

        Returns:
          The open group: the same object until it is closed.

        Collective where it opens: every process of the mesh calls it, at the same place among its
        calls of `Group.open` and `Group.get`, so all have closed the group before, or none has. A
        process that takes a traced function out of JAX's caches does not run what is in it: over
        several processes get the group outside of jit. Else: no.
        Raises: GroupError where the open group has other settings, or another process opened it
          (in a forked child), and where there is no mesh, or more than one that it may be; what
          the open group has failed with, which then is to be closed; when it opens, as
          `Group.open`.
        """
        found = _lookup.find_mesh(mesh, axis, name)
        arguments = _open_arguments.check(
            found,
            _lookup.find_axis(found, axis),
            name=name,
            backend=backend,
            timeout=config.DEFAULT_TIMEOUT_S if timeout is None else timeout,
            num_sms=num_sms,
            ranks_per_node=ranks_per_node,
            debug=debug,
            op="Group.get",
        )
        with _registry.opening(arguments.spec.identity):
            group = _registry.open_groups.get(arguments.spec.identity)
            if group is None:
                return cls._open(found, arguments, backend=backend, debug=debug)
            group._require_own_process("Group.get")
            failure = group._failures.failure()
            if failure is not None:
                raise failure
            _lookup.require_settings(
                group,
                backend=None if backend == "auto" else backend,
                timeout=None if timeout is None else arguments.timeout,
                num_sms=arguments.num_sms,
                ranks_per_node=None if ranks_per_node is None else arguments.ranks_per_node,
                debug=debug,
            )
            return group

    @classmethod
    def _open(
        cls,
        mesh: jax.sharding.Mesh,
        arguments: OpenArguments,
        *,
        backend: str,
        debug: bool | None,
    ) -> Self:
        identity = arguments.spec.identity
        slices = [seat.slice for seat in arguments.spec.seats()]
        with (
            _jax_compat.clean_context(),
            ExitStack() as undo,
            _bootstrap.meet(mesh, identity, slices, timeout=arguments.timeout) as meeting,
        ):
            if identity in _registry.open_groups:
                raise GroupError(
                    f"Group.open: a group named {arguments.name!r} over the same axes and devices "
                    "is open; pass another name="
                )
            settings = _settings.settle(meeting, mesh, arguments, backend=backend, debug=debug)
            group = cls(mesh, arguments, settings, meeting)
            undo.callback(group._discard)
            group._start(is_wanted=backend == settings.backend)
            if backend == "auto":
                group._warn_of_fallback()
            undo.pop_all()
        return group

    @property
    def identity(self) -> str:
        """Name and fingerprint: what compiled code and handles carry, equal in every process."""
        return self.spec.identity

    def _warn_of_fallback(self) -> None:
        """In one process: the reason is the same in all of them.

        Whoever makes errors of warnings has the group not opened, in any process.
        """
        why_not = _backends.why_no_custom_calls(self.mesh, self.backends)
        if why_not is None:
            return
        if self._meeting.processes[0] == jax.process_index():
            warnings.warn(
                f"Group.open: group {self.identity} runs on stock collectives, back end 'xla': "
                f"{why_not}",
                stacklevel=4,
            )
        self.wait_for_all("warning")

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
            self._hold(opened)
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
        self._hold(None)

    def _hold(self, native: NativeGroup | None) -> None:
        """The native half from now on; None: whoever else holds it keeps it alive."""
        self._native_group = self._failures.native = native

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
                self._failures.loss()
                excuse_failures(error, self._devices())
            if (failure := self._failures.recorded()) is not None and str(failure) != str(error):
                # It may be why: a failed call gives NaNs.
                error.add_note(f"group {self.identity}: {type(failure).__name__}: {failure}")
        finally:
            self.close()

    def __copy__(self) -> Self:
        """There is one group of an identity: a copy of a model has the model's group."""
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """As an identity: what loads it has opened its own group, or gets a GroupError."""
        return _registry.load_group, (self.identity,)

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
        with _jax_compat.clean_context():
            arrays = arrays_in(results) if results else live_arrays(self._devices())
            self._watch_interrupts()
            problems = self._wait(arrays) + _jax_compat.wait_for_effects()
        self._failures.raise_known(problems)
        _interrupts.survive()

    def wait_for_results(self, *results: Any) -> None:
        """The same for results alone: what programs before have failed with is left to others."""
        self._failures.raise_known(self._wait(arrays_in(results)))

    def _wait(self, arrays: list[jax.Array]) -> list[Exception]:
        """What JAX raises for the arrays."""
        if self._meeting.is_alone:
            return wait(arrays)
        return settle(
            arrays, failure=self._failures.failure, loss=self._failures.loss, timeout=self.timeout
        )

    def _watch_interrupts(self) -> None:
        """Or watches them again, where somebody has set a handler since."""
        if self._native_group is not None:
            _interrupts.watch()

    def _devices(self) -> set[jax.Device]:
        return set(self.mesh.devices.flat)

    def let_go_at_exit(self) -> None:
        """At the exit of the interpreter, behind all that asks how the group is.

        The module of native objects reports those that are left when Python has ended. Some are:
        JAX's registry of pytrees, which is no part of Python, keeps classes of a script, they keep
        the script's variables, and a group is one of them.
        """
        self._meeting.asks_for_others = None
        self._hold(None)

    def leave_alone_now(self) -> None:
        """At the exit of the interpreter, which would wait for the other processes."""
        self._meeting.leave_alone_now()

    def require_traceable(self, op: str) -> None:
        """Raises unless `op` may be traced here with this group."""
        if not self._is_open:
            raise GroupError(f"{op}: group {self.identity} is closed")
        self._require_own_process(op)
        self._failures.raise_known()
        require_mesh_of(self.spec, op)

    def report_bad_routing(self, op: str, rank: Any, num_invalid: Any, num_repeated: Any) -> None:
        """Keeps what debug mode found in one routing until `check()`."""
        self._failures.add_bad_routing(op, rank, num_invalid, num_repeated)


def _let_go_at_exit() -> None:
    for group in list(_registry.groups):
        group.let_go_at_exit()


atexit.register(_let_go_at_exit)
atexit.register(_interrupts.end_program)  # before the other
