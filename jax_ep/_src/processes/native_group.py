"""Opening of the native half of a group: positions of the ranks, and shared memory."""

import math
import os
import socket
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import jax
import numpy as np

from jax_ep._src.base import config, limits, native_modules
from jax_ep._src.base.errors import GroupError
from jax_ep._src.base.group_spec import GroupSpec, MeshPosition
from jax_ep._src.processes import unix_links
from jax_ep._src.processes.drain import drain
from jax_ep._src.processes.rendezvous import Rendezvous

_STILL_RUNS = "a program that was launched before it was closed still runs"


class NativeGroup(NamedTuple):
    """An opened native group.

    Attributes:
      handle: the native object.
      backend: back end of the native object.
      slices: the slices of the group that the native object has, in its order.
      why_staged: why operands are copied before peers read them; None: they are read in place.
      staging_bytes: room for the operands of one call if they are copied; the back end cannot
        carry more.
      has_packets: whether 16 bytes arrive at a peer at once.
      low_latency_room: bytes that one rank can send to another in a low-latency exchange.
      in_flight_room: the same where the exchange is sent and received apart.
    """

    handle: Any
    backend: str
    slices: tuple[int, ...]
    why_staged: str | None = None
    staging_bytes: int | None = None
    has_packets: bool = True
    low_latency_room: int = 0
    in_flight_room: int = 0

    def abandon(self) -> None:
        """Makes the end of the group not wait for devices: after a loss, or in a forked child."""
        if self.backend == "cuda":
            self.handle.abandon()

    def left_out(self) -> tuple[int, ...]:
        """Returns the ranks that calls on this process's devices leave out for good."""
        return tuple(self.handle.left_out()) if self.backend == "cuda" else ()

    def close(self, spec: GroupSpec) -> None:
        """Forgets the group; executables that hold it keep it alive."""
        native_modules.load(self.backend).close_group(spec.identity)


class NativeOpening:
    """The part of one process in opening a group; collective over the processes of the mesh."""

    def __init__(
        self,
        mesh: jax.sharding.Mesh,
        spec: GroupSpec,
        rendezvous: Rendezvous,
        timeout: float,
        *,
        low_latency_bytes: int,
        in_flight_bytes: int,
        survives: bool,
    ):
        self._mesh = mesh
        self._spec = spec
        self._rendezvous = rendezvous
        self._timeout = timeout
        self._timeout_ms = math.ceil(timeout * 1000)
        self._low_latency_bytes = low_latency_bytes
        self._in_flight_bytes = in_flight_bytes
        self._survives = survives
        near = {jax.process_index(), *rendezvous.neighbours}
        devices = list(mesh.devices.flat)
        positions = [p for p in spec.positions() if devices[p.place].process_index in near]
        self._slices = tuple(sorted({p.slice for p in positions}))
        # Positions of this process and its neighbours. The native group numbers only their slices.
        self._positions = [p._replace(slice=self._slices.index(p.slice)) for p in positions]
        self._devices = [devices[p.place] for p in positions]

    def open_cpu(self) -> NativeGroup:
        """Opens the group over CPU devices."""
        if native_modules.load("cpu").has_closed_group(self._spec.identity) and not self._drain():
            raise GroupError(f"Group.open: {_STILL_RUNS}")
        handle = self._open("cpu", self._positions, **self._processes())
        if self._rendezvous.neighbours:
            self._rendezvous.asks_for_others = handle.has_other_processes
        return NativeGroup(handle, "cpu", self._slices)

    def open_cuda(self) -> NativeGroup | str:
        """Opens the group over GPUs; or returns why processes cannot map one another's memory."""
        opened = self._open_or_reopen_cuda()
        if isinstance(opened, str):
            return opened
        opened.handle.set_survives(self._survives)
        atomics = self._rendezvous.gather("native atomics", opened.handle.has_native_atomics)
        has_packets = all(atomics.values())
        if not has_packets:
            return opened._replace(has_packets=False)
        num_ranks = self._spec.num_ranks
        return opened._replace(
            low_latency_room=limits.low_latency_room(num_ranks, self._low_latency_bytes),
            in_flight_room=limits.in_flight_room(num_ranks, self._in_flight_bytes),
        )

    def _open_or_reopen_cuda(self) -> NativeGroup | str:
        spare, most = config.staging_bytes_from_environment()
        self._rendezvous.agree("staging", {"the room for staged operands": [spare, most]})
        grows = config.why_pool_grows() if self._rendezvous.crosses_processes else None
        why_staged = self._first_problem("allocators", config.why_staged() or grows or "")
        reopened = self._reopen_cuda(why_staged, spare, most)
        if reopened is not None:
            return reopened
        if why_staged is None:
            group = self._open_cuda(None, spare)
            why_staged = self._find_pools(group)
            if why_staged is None:
                return group
        group = self._open_cuda(why_staged, most)
        if not self._rendezvous.crosses_processes:
            return group
        group, why_not = self._share(group, with_pools=False)
        return group if why_not is None else why_not

    def _reopen_cuda(self, why_staged: str | None, spare: int, most: int) -> NativeGroup | None:
        """Reopens a closed group in its old memory, to which captured programs refer.

        Returns None if in one of the processes no executable holds the group, or if it was open
        with other settings. Programs compiled with the old group then raise at their next launch.
        """
        native = native_modules.register("cuda")
        closed = native.find_closed_group(self._spec.identity)
        is_usable = (
            closed is not None
            and closed.low_latency_bytes == self._low_latency_bytes
            and closed.in_flight_bytes == self._in_flight_bytes
            and (
                closed.staging_bytes == most
                if closed.stages_all
                else why_staged is None and closed.staging_bytes == spare
            )
        )
        if not all(self._rendezvous.gather("closed group", is_usable).values()):
            return None
        # A process may clear signals only when no call of a peer is under way.
        if self._first_problem("end of old calls", "" if self._drain() else _STILL_RUNS):
            return None
        problem = ""
        try:
            native.reopen_group(closed, timeout_ms=self._timeout_ms)
        except (RuntimeError, ValueError) as e:
            problem = str(e)
        found = self._first_problem("reopening", problem)
        if found is not None:
            raise GroupError(f"Group.open: back end 'cuda': {found}")
        if not closed.stages_all:
            return NativeGroup(closed, "cuda", self._slices)
        why = why_staged or "as when the group was opened first"
        return NativeGroup(closed, "cuda", self._slices, why, closed.staging_bytes)

    def _first_problem(self, topic: str, problem: str) -> str | None:
        if self._rendezvous.is_alone:
            return problem or None
        return self._rendezvous.first_problem(topic, problem)

    def _drain(self) -> bool:
        """Waits for programs on the mesh's devices of this process; returns whether all ended."""
        devices = [d for d in self._devices if _is_here(d)]
        return drain(devices, timeout=self._timeout)

    def _find_pools(self, group: NativeGroup) -> str | None:
        """Lets peers read XLA's memory in place; closes the group and says why if they cannot."""
        if self._rendezvous.crosses_processes:
            return self._share(group, with_pools=True)[1]
        problem = ""
        for index, device in enumerate(self._devices):
            buffer = jax.device_put(np.zeros(1, np.float32), device)
            if not group.handle.find_pool(index, buffer.unsafe_buffer_pointer()):
                problem = f"the memory that XLA gives on {device} is not mapped for its peers"
                break
        found = self._first_problem("pools", problem)
        if found is not None:
            group.close(self._spec)
        return found

    def _share(self, group: NativeGroup, *, with_pools: bool) -> tuple[NativeGroup, str | None]:
        """Shares the group's memory between processes; closes the group if that fails.

        Returns the group, and why its memory cannot be shared, or None.
        """
        try:
            why_not = _share_devices(
                self._rendezvous, group.handle, self._devices, with_pools=with_pools
            )
        except BaseException:
            group.close(self._spec)
            raise
        if why_not is not None:
            group.close(self._spec)
        return group, why_not

    def _open_cuda(self, why_staged: str | None, staging_bytes: int) -> NativeGroup:
        handle = self._open(
            "cuda",
            [
                p._replace(device=native_modules.cuda_device_of(d) if _is_here(d) else -1)
                for p, d in zip(self._positions, self._devices, strict=True)
            ],
            is_here=[_is_here(d) for d in self._devices],
            staging_bytes=staging_bytes,
            stages_all=why_staged is not None,
            low_latency_bytes=self._low_latency_bytes,
            in_flight_bytes=self._in_flight_bytes,
        )
        handle.join_interrupts(native_modules.load("cpu").interrupts())
        room = None if why_staged is None else staging_bytes
        return NativeGroup(handle, "cuda", self._slices, why_staged, room)

    def _open(self, backend: str, positions: list[MeshPosition], **own: Any) -> Any:
        try:
            native = native_modules.register(backend)
            if "links" in own:
                self._rendezvous.hand_over()
            return native.open_group(
                identity=self._spec.identity,
                positions=positions,
                num_slices=len(positions) // self._spec.num_ranks,
                num_ranks=self._spec.num_ranks,
                timeout_ms=self._timeout_ms,
                **own,
            )
        except (RuntimeError, ValueError) as e:
            raise GroupError(f"Group.open: back end {backend!r}: {e}") from e

    def _processes(self) -> dict[str, Any]:
        """Returns the arguments about processes for a CPU group, which takes over the sockets."""
        if not self._rendezvous.neighbours:
            return {}
        return {
            "processes": [d.process_index for d in self._devices],
            "own_process": jax.process_index(),
            "links": [
                (link.process, link.pid, link.socket.fileno()) for link in self._rendezvous.links
            ],
        }


def _is_here(device: jax.Device) -> bool:
    is_here: bool = device.process_index == jax.process_index()
    return is_here


def _share_devices(
    rendezvous: Rendezvous, native: Any, devices: Sequence[jax.Device], *, with_pools: bool
) -> str | None:
    """Maps the group's memory, and XLA's, on the GPUs of all neighbours into each process.

    Args:
      rendezvous: the rendezvous of all processes of the mesh; every process takes part.
      native: the native group.
      devices: the devices of its positions, in their order.
      with_pools: whether XLA's memory is mapped; the native group must be opened for that.

    Returns None, or why the memory cannot be mapped; the answer is equal in all processes.
    """
    topic = "pools" if with_pools else "signals"
    numbers = []
    own: list[int] = []  # descriptors to close
    held: list[int] = []
    problem, is_echo = "", False
    try:
        try:
            for index, device in enumerate(devices):
                if _is_here(device):
                    buffer = jax.device_put(np.zeros(1, np.float32), device)
                    address = buffer.unsafe_buffer_pointer()
                    told, control, pool = native.export_position(index, address)
                    numbers.append((index, told))
                    own += [control, pool] if with_pools else [control]
        except RuntimeError as e:
            problem = str(e)
        why_not = rendezvous.first_problem(f"exports of {topic}", problem)
        if why_not is not None:
            return why_not
        try:
            swapped = _swap(rendezvous, numbers, own, held)
            for indices, received in swapped.values():
                controls = received[::2] if with_pools else received
                pools = received[1::2] if with_pools else [-1] * len(received)
                for (index, told), control, pool in zip(indices, controls, pools, strict=True):
                    for descriptor in {control, pool} - {-1}:
                        held.remove(descriptor)
                    native.import_position(index, told, control, pool)
        except (OSError, RuntimeError, ValueError) as e:
            problem, is_echo = str(e), isinstance(e, (ConnectionError, TimeoutError))
        why_not = rendezvous.first_problem(f"mapping of {topic}", problem, is_echo=is_echo)
    finally:
        for descriptor in own + held:
            os.close(descriptor)
    if why_not is None:
        native.complete()
    return why_not


def _swap(
    rendezvous: Rendezvous, numbers: Any, own: list[int], held: list[int]
) -> dict[int, tuple[Any, list[int]]]:
    try:
        return unix_links.swap(
            rendezvous.links, numbers, own, held, timeout=rendezvous.sockets_timeout
        )
    except OSError:
        # Nobody should wait for the rest of this message, or take it for another message.
        for link in rendezvous.links:
            with suppress(OSError):
                link.socket.shutdown(socket.SHUT_RDWR)
        raise
