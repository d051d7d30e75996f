"""Group: the ranks that exchange rows, and everything that they own."""

import atexit
import os
from types import TracebackType
from typing import Any, Literal, Self

import jax

from jax_ep._src.base import config, jax_compat, registry, tables
from jax_ep._src.base.errors import GroupError
from jax_ep._src.base.group_spec import GroupSpec
from jax_ep._src.base.options import BackendName
from jax_ep._src.base.spec import Usability
from jax_ep._src.group import info
from jax_ep._src.group.failures import Failures
from jax_ep._src.group.info import GroupInfo
from jax_ep._src.group.settings import OpenArguments, Settings
from jax_ep._src.group.shard_map import require_mesh_of
from jax_ep._src.processes import interrupts
from jax_ep._src.processes.domains import Nodes
from jax_ep._src.processes.native_group import NativeGroup
from jax_ep._src.processes.rendezvous import Rendezvous
from jax_ep._src.processes.wait import arrays_in, excuse_failures, live_arrays, settle, wait


class Group:
    """The ranks along one or more mesh axes that exchange rows with each other.

    Open a group with `Group.open`, use it as a context manager, and pass it to the operations as
    `group=`. `Group.get` finds the open group again, or opens it. `copy.copy` and `copy.deepcopy`
    return the group itself. A loaded pickle finds the open group of the same identity. One group
    covers all slices of the mesh along the other axes. Compiled functions keep the memory that
    they need alive: they may run after `close()`, but no function can be traced with a closed
    group.

    Attributes:
      mesh: the mesh that the group was opened over.
      axes: mesh axes along which the ranks run.
      name: name that tells apart groups over the same mesh and axes.
      num_ranks: ranks of one slice.
      ranks_per_node: ranks of one node.
      num_sms: SMs that every dispatch, combine and ragged exchange uses on GPUs unless the call
        says otherwise; None: `budgets` give the number by exchange and layout, for many tokens.
      low_latency_bytes: bytes of each GPU for what peers send in calls of few tokens.
      in_flight_bytes: the same for calls that are sent and received apart.
      backend: the back end in use.
      timeout: seconds that a rank waits for its peers.
      survives: whether the group goes on without processes that were lost.
      debug: whether routings are checked on the device.
      identity: name and fingerprint, equal in every process.
      spec, nodes, backends, tuning, budgets: facts for the operations; `info()` describes them to
        users.
      parts: the groups of the nodes and of the rails, which only this group knows; none if it has
        one node.
    """

    mesh: jax.sharding.Mesh
    axes: tuple[str, ...]
    name: str
    num_ranks: int
    ranks_per_node: int
    num_sms: int | None
    low_latency_bytes: int
    in_flight_bytes: int
    backend: str
    timeout: float
    survives: bool
    debug: bool
    spec: GroupSpec
    nodes: Nodes
    backends: dict[str, Usability]
    tuning: tables.Table
    budgets: tables.Budgets
    parts: "tuple[Group, ...]"

    def __init__(
        self,
        mesh: jax.sharding.Mesh,
        arguments: OpenArguments,
        settings: Settings,
        rendezvous: Rendezvous,
    ):
        """Makes a group that is not open yet. Users call `Group.open` or `Group.get`."""
        self.mesh = mesh
        self.axes = arguments.axes
        self.name = arguments.name
        self.num_ranks = arguments.num_ranks
        self.num_sms = arguments.num_sms
        self.low_latency_bytes = arguments.low_latency_bytes
        self.in_flight_bytes = arguments.in_flight_bytes
        self.timeout = arguments.timeout
        self.survives = arguments.survives
        self.spec = arguments.spec
        self.backend = settings.backend
        self.nodes = settings.nodes
        self.ranks_per_node = settings.nodes.ranks_per_node
        self.debug = settings.debug
        self.backends = settings.backends
        self.tuning = settings.tuning
        self.budgets = settings.budgets
        self.parts = ()
        self._rendezvous = rendezvous
        self._native_group: NativeGroup | None = None
        self._failures = Failures(mesh, self.spec, rendezvous, survives=arguments.survives)
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
        low_latency_bytes: int | None = None,
        in_flight_bytes: int | None = None,
        ranks_per_node: int | None = None,
        survives: bool = False,
        debug: bool | None = None,
    ) -> Self:
        """Opens a group over the devices of a mesh.

        Args:
          mesh: the mesh that the program's `jax.shard_map` uses, devices included.
          axis: the axis or axes along which the ranks run; rank = row-major index over them.
          name: name that tells apart groups over the same mesh and axes; default: the axes, joined
            by "_".
          backend: "auto", "cpu" (host implementation), "cuda" (kernels) or "xla" (XLA's
            collectives). `info()` says what "auto" chose, and why. With "auto" and without
            num_sms, `xla` carries the exchanges for which the table of this device says that `xla`
            is faster, by layout.
          timeout: seconds that a custom call waits for a rank before the group fails. Calls on the
            `xla` back end wait as long as XLA's collectives do; over several hosts, `check()` does
            not wait for them once a process has given no sign of life for so long. Default: 60; at
            most a day. Over several processes it should be below JAX's heartbeat timeout.
          num_sms: SMs that every dispatch, combine and ragged exchange of the `cuda` back end uses
            unless the call says otherwise. Default: the number in the table for this device and
            number of ranks, by exchange and layout, from 16 to 64 in the package's table
            (`info().budgets`). Fewer SMs leave more to computation that runs at the same time. The
            all_reduce family takes up to 64, and so do dispatches and combines of up to 128 tokens
            without num_sms.
          low_latency_bytes: bytes of each GPU that hold what peers send in dispatches and combines
            of few tokens; `jax_ep.low_latency_bytes` computes them. Default: 16 MiB, enough for 128
            bf16 rows of 7,168 elements between two ranks. 0: plain calls take other kernels.
          in_flight_bytes: the same for `low_latency_dispatch_send` and `low_latency_combine_send`;
            `jax_ep.in_flight_bytes` computes them. Default: 0, for groups that do not use these.
          ranks_per_node: ranks of one node, consecutive. Default: the ranks of a host if those of a
            slice are on several hosts, consecutive on each, equally many and two or more; else all.
            `info()` says where the number comes from. With several nodes, `dispatch`,
            `dispatch_fp8`, `combine`, `combine_weights` and their gradients run in two levels: a
            token crosses once to each node where it has experts, and each node adds up its rows of
            a token before the sum crosses back. The other operations go straight from rank to rank.
            `info().transport` says what carries rows between the nodes.
          survives: whether the group goes on when another process of it ends, in calls with
            `rank_mask`. Then `check()` does not raise for a process that was lost, and Ctrl-C in
            one process ends only the calls of its own ranks.
          debug: whether the group counts bad ids of every routing and raises them in `check()`;
            default: the environment variable JAX_EP_DEBUG.

        Returns:
          The open group, after a self-test that moved data between every pair of ranks.

        Collective: every process of the mesh opens the group, with the same arguments.
        Raises: ConfigError; GroupError, also if the processes disagree or run different builds, or
          if a process does not come within `timeout`; PeerTimeoutError if a process that came is
          lost. If one process fails, all processes raise.
        Warns: if "auto" falls back to XLA's collectives on CPUs or GPUs. The first process of the
          mesh warns, with the reason.
        Source: DeepEP's Buffer (DeepSeek, 2025), with the mesh in the place of a process group.
        """
        from jax_ep._src.opening.open import open_group  # a floor above the operations

        return open_group(
            cls,
            mesh,
            axis,
            name=name,
            backend=backend,
            timeout=timeout,
            num_sms=num_sms,
            low_latency_bytes=low_latency_bytes,
            in_flight_bytes=in_flight_bytes,
            ranks_per_node=ranks_per_node,
            survives=survives,
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
        low_latency_bytes: int | None = None,
        in_flight_bytes: int | None = None,
        ranks_per_node: int | None = None,
        survives: bool | None = None,
        debug: bool | None = None,
    ) -> Self:
        """Returns the open group over a mesh and axis, or opens it if there is none.

        Use it in layers that learn their mesh when they are called, in cells of a notebook that
        run twice, and in models that outlive a group. It may be called while JAX traces, also in
        the body of a `jax.shard_map`. A caller that closes the group closes it for all callers.

        Args:
          mesh: as for `Group.open`. None: the mesh of `jax.set_mesh`, or of the enclosing
            `jax.shard_map`. Under jit, JAX knows the mesh of a `jax.shard_map` only without its
            devices, as an `AbstractMesh`. An `AbstractMesh` stands for the mesh of `jax.set_mesh`,
            or else for the mesh of an open group, with the same axes and sizes.
          axis: as for `Group.open`. None: the only axis of the mesh.
          name: as for `Group.open`. A group of another name is another group, and left alone.
          backend: back end that the group must use; "auto": any.
          timeout: timeout that the group must have; None: any.
          num_sms: num_sms that the group must have; None: any.
          low_latency_bytes: low_latency_bytes that the group must have; None: any.
          in_flight_bytes: in_flight_bytes that the group must have; None: any.
          ranks_per_node: ranks_per_node that the group must have; None: any.
          survives: survives that the group must have; None: any.
          debug: debug mode that the group must have; None: any.

        If the call opens the group, these are its settings, and `Group.open`'s defaults replace
        "auto" and None. The settings of an earlier group that was closed do not matter.

        Returns:
          The open group: the same object until it is closed.

        Collective: if it opens the group, every process of the mesh calls it, at the same place
          among its calls of `Group.open` and `Group.get`. So all processes must have closed the
          group before, or none. Else: no. A process that takes a traced function out of JAX's
          caches does not run a `Group.get` in it. Over several processes call it outside of jit.
        Raises: GroupError if the open group has other settings, if another process opened it (in a
          forked child), if no mesh fits, or if several do; the failure of an open group that has
          failed, which the caller should then close; if it opens the group, as `Group.open`.
        """
        from jax_ep._src.opening.open import get_group  # a floor above the operations

        return get_group(
            cls,
            mesh,
            axis,
            name=name,
            backend=backend,
            timeout=timeout,
            num_sms=num_sms,
            low_latency_bytes=low_latency_bytes,
            in_flight_bytes=in_flight_bytes,
            ranks_per_node=ranks_per_node,
            survives=survives,
            debug=debug,
        )

    @property
    def identity(self) -> str:
        """The name and fingerprint that compiled code and handles carry, equal in every process."""
        return self.spec.identity

    def close(self) -> None:
        """Ends the group. Compiled functions that use it may still run. Idempotent.

        Collective: no. Over several processes the other processes may go on, but not with calls in
        which ranks of this process take part.
        """
        if not self._is_open:
            return
        self._is_open = False
        registry.open_groups.pop(self.identity, None)
        if self._is_inherited():  # the parent still uses the group, and its threads are not here
            for group in (self, *self.parts):
                if group._native_group is not None:
                    group._native_group.abandon()
            return
        if self.survives:
            self._failures.loss()  # if a process was lost, the exit must not wait for it
        if self._native_group is not None:
            self._native_group.close(self.spec)
        self._rendezvous.close()
        for part in self.parts:
            part.close()

    def _is_inherited(self) -> bool:
        """Returns whether this process is a forked child of the one that opened the group."""
        return os.getpid() != self._pid

    def _require_own_process(self, op: str) -> None:
        if self._is_inherited():
            raise GroupError(
                f"{op}: process {self._pid} opened group {self.identity}; its forked child "
                f"{os.getpid()} cannot use it"
            )

    def require_usable(self, op: str) -> None:
        """Raises the failure of the group, if it has failed. Raises in a forked child."""
        self._require_own_process(op)
        failure = self._failures.failure()
        if failure is not None:
            raise failure

    def discard(self) -> None:
        """Frees everything at once after a failure to open: its exception refers to the group."""
        self.close()
        for group in (self, *self.parts):
            group.hold(None)

    def add_part(self, part: "Group") -> None:
        """Makes a group a part of this one, which then closes it and raises its failures."""
        self.parts = (*self.parts, part)
        self._failures.parts = (*self._failures.parts, part._failures)

    def hold(self, native: NativeGroup | None) -> None:
        """Sets the native half. None drops it: executables that hold it keep it alive."""
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
                # Other processes may wait for calls that this process does not make any more.
                self._rendezvous.leave_alone_at_exit()
                self._failures.loss()
                excuse_failures(error, self._devices())
            if (failure := self._failures.recorded()) is not None and str(failure) != str(error):
                # The failure may be the reason for the error: a failed call returns NaN.
                error.add_note(f"group {self.identity}: {type(failure).__name__}: {failure}")
        finally:
            self.close()

    def __copy__(self) -> Self:
        """Returns the group itself: an identity has one group, so a copied model shares it."""
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles the identity. The loading process must have opened the group, or it raises."""
        return type(self)._load, (self.identity,)

    @classmethod
    def _load(cls, identity: str) -> "Group":
        """Returns the open group for the identity that a pickle carries."""
        return registry.load_group(identity)

    def __repr__(self) -> str:
        state = "" if self._is_open else ", closed"
        return f"Group({self.identity}, {self.num_ranks} ranks, backend={self.backend!r}{state})"

    def info(self) -> GroupInfo:
        """Describes the ranks of the group and what they run on. Collective: no."""
        native = self._native_group
        # A forked child has no part in the devices.
        left_out = () if native is None or self._is_inherited() else native.left_out()
        natives = [group._native_group for group in (self, *self.parts)]
        return info.describe(self, [n for n in natives if n is not None], left_out)

    def check(self, *results: Any) -> None:
        """Raises the failure of a device: a peer that did not come, or a bad routing.

        A device never raises by itself: an error on one device would leave the other devices
        waiting in XLA's collectives until the process is aborted. Instead the device ends its call
        with NaN and records the failure. `check` raises it; so do the end of the `with` block and
        the next trace.

        Args:
          *results: arrays, or pytrees of arrays, from the launches to check. `check` waits for
            them. Without arguments it waits for every live array on the group's devices.

        Deleted and donated arrays are skipped.

        Collective: no.
        Raises: PeerTimeoutError or GroupError, again at every later call; RoutingError (debug
          mode), once; ProgramError, from JAX's exception, if a program failed otherwise: at every
          call that gets results of the program, and once at calls without arguments.
        """
        self._require_own_process("Group.check")
        with jax_compat.clean_context():
            arrays = arrays_in(results) if results else live_arrays(self._devices())
            self.watch_interrupts()
            problems = self._wait(arrays) + jax_compat.wait_for_effects()
        self._failures.raise_known(problems)
        interrupts.survive()

    def wait_for_results(self, *results: Any) -> None:
        """Checks these results only; failures of earlier programs stay for other calls."""
        self._failures.raise_known(self._wait(arrays_in(results)))

    def _wait(self, arrays: list[jax.Array]) -> list[Exception]:
        """Waits for arrays; returns the exceptions that JAX raises for them."""
        if self._rendezvous.is_alone:
            return wait(arrays)
        return settle(
            arrays,
            failure=self._failures.failure,
            loss=self._failures.loss,
            silence=self._failures.silence,
            timeout=self.timeout,
        )

    def watch_interrupts(self) -> None:
        """Watches interrupts, again if another handler was set meanwhile."""
        if any(group._native_group is not None for group in (self, *self.parts)):
            interrupts.watch()

    def _devices(self) -> set[jax.Device]:
        return set(self.mesh.devices.flat)

    def let_go_at_exit(self) -> None:
        """Drops the native half at the exit of the interpreter, after every use of the group.

        nanobind reports native objects that are left when Python has ended. A group may be left:
        JAX's registry of pytrees, which is not Python memory, keeps the classes of a script. The
        classes keep the script's variables, and the group is one of them.
        """
        self._rendezvous.asks_for_others = None
        self.hold(None)

    def leave_alone_now(self) -> None:
        """Keeps the interpreter, which exits now, from waiting for the other processes."""
        self._rendezvous.leave_alone_now()

    def require_traceable(self, op: str) -> None:
        """Raises unless `op` may be traced here with this group."""
        if not self._is_open:
            raise GroupError(f"{op}: group {self.identity} is closed")
        self._require_own_process(op)
        self._failures.raise_known()
        require_mesh_of(self.spec, op)

    def report_bad_routing(self, op: str, rank: Any, num_invalid: Any, num_repeated: Any) -> None:
        """Keeps the findings of debug mode in one routing until `check()`."""
        self._failures.add_bad_routing(op, rank, num_invalid, num_repeated)


def _let_go_at_exit() -> None:
    for group in list(registry.groups):
        group.let_go_at_exit()


atexit.register(_let_go_at_exit)
atexit.register(interrupts.end_program)  # atexit calls it before _let_go_at_exit
