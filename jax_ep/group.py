"""Group: the ranks that exchange rows, and everything they own."""

import hashlib
import math
from collections import Counter
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Self

import jax

from jax_ep import (
    _backends,
    _bootstrap,
    _jax_compat,
    _native,
    _native_group,
    _registry,
    _self_test,
    _tuning,
    config,
)
from jax_ep._backends import Usability
from jax_ep._native_group import NativeGroup
from jax_ep._spec import GroupSpec
from jax_ep.errors import ConfigError, GroupError, PeerTimeoutError, RoutingError, error_of


@dataclass(frozen=True)
class GroupInfo:
    """What `Group.info()` tells.

    Attributes:
      identity: what compiled code carries; equal in every process.
      axes: the mesh axes that the ranks run along.
      num_ranks: ranks of one slice.
      num_slices: independent copies of the group along the mesh's other axes.
      ranks_per_node: ranks that share memory at full speed.
      backend: the back end in use.
      backends: every back end, and why it is or is not usable here.
      staging: why, and up to how much, operands are copied to where peers can read them, and what
        is done with larger ones; None: peers read operands in place.
      devices: one line per device, in mesh order.
      timeout: seconds that a rank waits for its peers.
      num_sms: SMs that a call uses on GPUs unless it says otherwise.
      debug: whether routings are checked on the device.
    """

    identity: str
    axes: tuple[str, ...]
    num_ranks: int
    num_slices: int
    ranks_per_node: int
    backend: str
    backends: dict[str, str]
    staging: str | None
    devices: tuple[str, ...]
    timeout: float
    num_sms: int
    debug: bool


@dataclass(eq=False, repr=False)
class Group:
    """The ranks along one or more mesh axes that exchange rows with each other.

    Open one with `Group.open`, use it as a context manager, pass it to the operations as `group=`.
    One group covers all slices of the mesh along the other axes. Compiled functions keep what they
    need alive: they may run after `close()`, but nothing new can be traced with a closed group.
    """

    mesh: jax.sharding.Mesh
    axes: tuple[str, ...]
    name: str
    num_ranks: int
    ranks_per_node: int
    num_sms: int
    backend: str
    timeout: float
    debug: bool
    spec: GroupSpec
    backends: dict[str, Usability]
    tuning: _tuning.Table
    _meeting: _bootstrap.Meeting | None = None
    _native_group: NativeGroup | None = None
    _is_open: bool = True
    _leaves_alone: bool = False
    _bad_routings: Counter[str] = field(default_factory=Counter)

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
            "auto" chose, and why, is in `info()`.
          timeout: seconds that a call of the custom calls waits for a rank before the group fails.
            The `xla` back end waits as XLA's collectives do. Over several processes it should be
            below JAX's heartbeat timeout.
          num_sms: SMs that a call of the `cuda` back end uses unless it says otherwise; default:
            DEFAULT_NUM_SMS of config.py. Fewer leave more to compute that runs beside it.
          ranks_per_node: ranks of one node, consecutive; default: all.
          debug: counts bad ids of every routing and raises them in `check()`; default: the
            environment variable JAX_EP_DEBUG.

        Returns:
          The open group, after a self-test that moved data between every pair of ranks.

        Collective: every process of the mesh opens it, with the same arguments.
        Raises: ConfigError; GroupError, also where the processes disagree, or one does not come
          within `timeout`.
        Source: DeepEP's Buffer (DeepSeek, 2025), with the mesh in the place of a process group.
        """
        axes = _check_mesh(mesh, axis)
        sizes = dict(mesh.shape)
        num_ranks = math.prod(sizes[a] for a in axes)
        ranks_per_node = config.require_int(
            num_ranks if ranks_per_node is None else ranks_per_node,
            minimum=1,
            op="Group.open",
            argument="ranks_per_node",
        )
        if num_ranks % ranks_per_node:
            raise ConfigError(
                f"Group.open: ranks_per_node must divide num_ranks={num_ranks}, "
                f"got {ranks_per_node}"
            )
        is_number = isinstance(timeout, (int, float))
        if not is_number or not 0 < timeout <= config.MAX_TIMEOUT_S:
            raise ConfigError(
                "Group.open: timeout must be positive seconds, at most "
                f"{config.MAX_TIMEOUT_S:.0f}, got {timeout!r}"
            )
        num_sms = config.require_int(
            config.DEFAULT_NUM_SMS if num_sms is None else num_sms,
            minimum=1,
            op="Group.open",
            argument="num_sms",
        )
        name = name if name is not None else "_".join(axes)
        if not isinstance(name, str):
            raise ConfigError(f"Group.open: name must be a string, got {name!r}")
        spec = _make_spec(mesh, axes, name)
        if spec.identity in _registry.open_groups:
            raise GroupError(
                f"Group.open: a group named {name!r} over the same axes and devices is open; "
                "pass another name="
            )
        debug = config.debug_from_environment() if debug is None else debug
        tuning = _tuning.load(mesh.devices.flat[0].device_kind, num_ranks)
        settings = {
            "backend": backend,
            "tuning": _tuning.to_plain(tuning),
            "num_sms": num_sms,
            "ranks_per_node": ranks_per_node,
            "timeout": timeout,
            "debug": debug,
        }
        meeting = _bootstrap.meet(mesh, spec.identity, settings)
        try:
            chosen, usability = _backends.resolve(
                mesh, backend, None if meeting is None else meeting.why_not_linked
            )
            if meeting is not None:
                complete = sorted(b for b, u in usability.items() if _backends.is_complete(u))
                meeting.agree("back ends", {"the back ends that are usable": complete})
            group = cls(
                mesh=mesh,
                axes=axes,
                name=name,
                num_ranks=num_ranks,
                ranks_per_node=ranks_per_node,
                num_sms=num_sms,
                backend=chosen,
                timeout=timeout,
                debug=debug,
                spec=spec,
                backends=usability,
                tuning=tuning,
                _meeting=meeting,
            )
            group._start(is_wanted=backend == chosen)
        except BaseException:
            if meeting is not None:
                meeting.abandon()
            raise
        return group

    @property
    def identity(self) -> str:
        """Name and fingerprint: what compiled code and handles carry, equal in every process."""
        return self.spec.identity

    def _start(self, *, is_wanted: bool) -> None:
        """`is_wanted`: the caller has named the back end, and takes no other."""
        if self.backends["cuda"].ops:
            _native.register("cuda")
        try:
            for backend in ("cpu", "cuda"):
                if _backends.is_complete(self.backends[backend]):
                    self._open_native(backend, is_wanted=is_wanted)
            _registry.open_groups[self.identity] = self
            _self_test.run(self)
        except BaseException:
            self.close()
            raise

    def _open_native(self, backend: str, *, is_wanted: bool) -> None:
        opening = _native_group.Opening(self.mesh, self.spec, self._meeting, self.timeout)
        opened = opening.open_cpu() if backend == "cpu" else opening.open_cuda()
        if not isinstance(opened, str):
            self._native_group = opened
            self.spec = replace(self.spec, staging_bytes=opened.staging_bytes)
            return
        why_not = f"the processes cannot map one another's memory: {opened}"
        if self.backend == backend and is_wanted:
            raise GroupError(f"Group.open: back end {backend!r} is not usable here: {why_not}")
        self.backends = _backends.without_exchange(self.backends, backend, why_not)
        if self.backend == backend:
            self.backend = "xla"

    def close(self) -> None:
        """Ends the group. Compiled functions that use it may still run; idempotent."""
        if not self._is_open:
            return
        self._is_open = False
        _registry.open_groups.pop(self.identity, None)
        if self._native_group is not None:
            self._native_group.close(self.spec)
        if self._meeting is not None and not self._leaves_alone:
            self._meeting.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                self.check()
        finally:
            self.close()

    def __repr__(self) -> str:
        state = "" if self._is_open else ", closed"
        return f"Group({self.identity}, {self.num_ranks} ranks, backend={self.backend!r}{state})"

    def info(self) -> GroupInfo:
        """Who is in the group and what it runs on."""
        return GroupInfo(
            identity=self.identity,
            axes=self.axes,
            num_ranks=self.num_ranks,
            num_slices=self.mesh.size // self.num_ranks,
            ranks_per_node=self.ranks_per_node,
            backend=self.backend,
            backends={name: usability.reason for name, usability in self.backends.items()},
            staging=self._staging(),
            devices=tuple(str(d) for d in self.mesh.devices.flat),
            timeout=self.timeout,
            num_sms=self.num_sms,
            debug=self.debug,
        )

    def _staging(self) -> str | None:
        native = self._native_group
        if native is None or native.why_staged is None or native.staging_bytes is None:
            return None
        return (
            f"operands of up to {native.staging_bytes >> 20} MiB a call are copied before peers "
            f"read them, larger ones take back end 'xla': {native.why_staged}"
        )

    def check(self, *results: Any) -> None:
        """Raises what went wrong on a device: a peer that did not come, a bad routing.

        A device never raises by itself: an error on one device would leave the others waiting in
        XLA's collectives until the process is aborted. It ends its call with NaN instead, and the
        record is raised here, when the `with` block ends, and at the next trace.

        Args:
          *results: arrays, or pytrees of them, of the launches to look at; they are waited for.
            None: every live array on the group's devices is.

        Raises: PeerTimeoutError, GroupError, RoutingError (debug mode).
        """
        devices = set(self.mesh.devices.flat)
        waited = results or [
            a for a in jax.live_arrays() if not a.is_deleted() and devices & a.devices()
        ]
        jax.block_until_ready(waited)
        jax.effects_barrier()
        self._raise_record()

    def _raise_record(self) -> None:
        native = self._native_group
        record = native.handle.error() if native is not None else None
        if record is not None:
            error = error_of(record)
            if isinstance(error, PeerTimeoutError):
                self._leave_alone_at_exit()
            raise error
        if self._bad_routings:
            message = "\n".join(
                line if times == 1 else f"{line} ({times} times)"
                for line, times in self._bad_routings.items()
            )
            self._bad_routings.clear()
            raise RoutingError(message)

    def _leave_alone_at_exit(self) -> None:
        native = self._native_group
        if self._meeting is None or native is None or self._leaves_alone:
            return
        self._leaves_alone = True
        on_cpus = native.backend == "cpu"
        _bootstrap.leave_alone_at_exit(
            native.handle.has_other_processes if on_cpus else self._meeting.has_others
        )

    def require_traceable(self, op: str) -> None:
        """Raises unless `op` may be traced here with this group."""
        if not self._is_open:
            raise GroupError(f"{op}: group {self.identity} is closed")
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


def _check_mesh(mesh: jax.sharding.Mesh, axis: Any) -> tuple[str, ...]:
    """The axes of the group, as a tuple."""
    if not isinstance(mesh, jax.sharding.Mesh):
        raise GroupError(
            f"Group.open: mesh must be a jax.sharding.Mesh with devices, got {type(mesh).__name__}"
        )
    axes = tuple(axis) if isinstance(axis, (tuple, list)) else (axis,)
    if not axes or not set(axes) <= set(mesh.axis_names) or len(set(axes)) != len(axes):
        raise GroupError(
            f"Group.open: axis must name distinct axes of the mesh {tuple(mesh.axis_names)}, "
            f"got {axes}"
        )
    return axes


def _make_spec(mesh: jax.sharding.Mesh, axes: tuple[str, ...], name: str) -> GroupSpec:
    mesh_axes = tuple(mesh.shape.items())
    device_ids = tuple(d.id for d in mesh.devices.flat)
    fingerprint = hashlib.sha256(repr((name, axes, mesh_axes, device_ids)).encode()).hexdigest()
    return GroupSpec(
        identity=f"{name}-{fingerprint[:16]}",
        axes=axes,
        mesh_axes=mesh_axes,
        device_ids=device_ids,
    )
