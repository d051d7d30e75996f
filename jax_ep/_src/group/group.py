"""Group: the ranks that exchange rows, and everything they own."""

import atexit
import os
from types import TracebackType
from typing import Any, Literal, Self

import jax

from jax_ep._src.base import config, jax_compat, registry, tables
from jax_ep._src.base.errors import GroupError
from jax_ep._src.base.options import BackendName
from jax_ep._src.base.spec import GroupSpec, Usability
from jax_ep._src.group import info
from jax_ep._src.group.failures import Failures
from jax_ep._src.group.info import GroupInfo
from jax_ep._src.group.settings import OpenArguments, Settings
from jax_ep._src.group.shard_map import require_mesh_of
from jax_ep._src.processes import interrupts
from jax_ep._src.processes.native_group import NativeGroup
from jax_ep._src.processes.rendezvous import Rendezvous
from jax_ep._src.processes.wait import arrays_in, excuse_failures, live_arrays, settle, wait


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
    tuning: tables.Table
    budgets: tables.Budgets

    def __init__(
        self,
        mesh: jax.sharding.Mesh,
        arguments: OpenArguments,
        settings: Settings,
        rendezvous: Rendezvous,
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
        self._rendezvous = rendezvous
        self._native_group: NativeGroup | None = None
        self._failures = Failures(mesh, self.spec, rendezvous)
        self._is_open = True
        self._pid = os.getpid()
        registry.groups.add(self)

    @classmethod
    def open(
        cls,
        mesh: jax.sharding.Mesh,
        axis: str | tuple[str, ...],
        *,
        name: str | None = None,
        backend: Literal["auto"] | BackendName = "auto",
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
        from jax_ep._src.opening.open import open_group  # stands above the operations

        return open_group(
            cls,
            mesh,
            axis,
            name=name,
            backend=backend,
            timeout=timeout,
            num_sms=num_sms,
            ranks_per_node=ranks_per_node,
            debug=debug,
        )

    @classmethod
    def get(
        cls,
        mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh | None = None,
        axis: str | tuple[str, ...] | None = None,
        *,
        name: str | None = None,
        backend: Literal["auto"] | BackendName = "auto",
        timeout: float | None = None,
        num_sms: int | None = None,
        ranks_per_node: int | None = None,
        debug: bool | None = None,
    ) -> Self:
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
        from jax_ep._src.opening.open import get_group  # stands above the operations

        return get_group(
            cls,
            mesh,
            axis,
            name=name,
            backend=backend,
            timeout=timeout,
            num_sms=num_sms,
            ranks_per_node=ranks_per_node,
            debug=debug,
        )

    @property
    def identity(self) -> str:
        """Name and fingerprint: what compiled code and handles carry, equal in every process."""
        return self.spec.identity

    def close(self) -> None:
        """Ends the group. Compiled functions that use it may still run; idempotent.

        Collective: no; over several processes the others may go on, but not with what this one's
        ranks take part in.
        """
        if not self._is_open:
            return
        self._is_open = False
        registry.open_groups.pop(self.identity, None)
        if self._is_inherited():  # the parent uses it, and its threads are not here
            if self._native_group is not None:
                self._native_group.abandon()
            return
        if self._native_group is not None:
            self._native_group.close(self.spec)
        self._rendezvous.close()

    def _is_inherited(self) -> bool:
        """Whether this is a forked child of the process that opened the group."""
        return os.getpid() != self._pid

    def _require_own_process(self, op: str) -> None:
        if self._is_inherited():
            raise GroupError(
                f"{op}: process {self._pid} opened group {self.identity}; its forked child "
                f"{os.getpid()} cannot use it"
            )

    def require_usable(self, op: str) -> None:
        """Raises what the group has failed with, and in a forked child."""
        self._require_own_process(op)
        failure = self._failures.failure()
        if failure is not None:
            raise failure

    def discard(self) -> None:
        """After a failure to open: all is freed now, not with the exception that refers to it."""
        self.close()
        self.hold(None)

    def hold(self, native: NativeGroup | None) -> None:
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
                self._rendezvous.leave_alone_at_exit()
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
        return type(self)._load, (self.identity,)

    @classmethod
    def _load(cls, identity: str) -> "Group":
        """The open group of an identity, as a pickle carries it."""
        return registry.load_group(identity)

    def __repr__(self) -> str:
        state = "" if self._is_open else ", closed"
        return f"Group({self.identity}, {self.num_ranks} ranks, backend={self.backend!r}{state})"

    def info(self) -> GroupInfo:
        """Who is in the group and what it runs on. Collective: no."""
        return info.describe(self, self._native_group)

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
        with jax_compat.clean_context():
            arrays = arrays_in(results) if results else live_arrays(self._devices())
            self.watch_interrupts()
            problems = self._wait(arrays) + jax_compat.wait_for_effects()
        self._failures.raise_known(problems)
        interrupts.survive()

    def wait_for_results(self, *results: Any) -> None:
        """The same for results alone: what programs before have failed with is left to others."""
        self._failures.raise_known(self._wait(arrays_in(results)))

    def _wait(self, arrays: list[jax.Array]) -> list[Exception]:
        """What JAX raises for the arrays."""
        if self._rendezvous.is_alone:
            return wait(arrays)
        return settle(
            arrays, failure=self._failures.failure, loss=self._failures.loss, timeout=self.timeout
        )

    def watch_interrupts(self) -> None:
        """Or watches them again, where somebody has set a handler since."""
        if self._native_group is not None:
            interrupts.watch()

    def _devices(self) -> set[jax.Device]:
        return set(self.mesh.devices.flat)

    def let_go_at_exit(self) -> None:
        """At the exit of the interpreter, behind all that asks how the group is.

        The module of native objects reports those that are left when Python has ended. Some are:
        JAX's registry of pytrees, which is no part of Python, keeps classes of a script, they keep
        the script's variables, and a group is one of them.
        """
        self._rendezvous.asks_for_others = None
        self.hold(None)

    def leave_alone_now(self) -> None:
        """At the exit of the interpreter, which would wait for the other processes."""
        self._rendezvous.leave_alone_now()

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
    for group in list(registry.groups):
        group.let_go_at_exit()


atexit.register(_let_go_at_exit)
atexit.register(interrupts.end_program)  # before the other
