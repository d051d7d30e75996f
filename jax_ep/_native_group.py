"""Opening the native half of a group: who sits where, and what memory the ranks share."""

import math
import os
import socket
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import jax
import numpy as np

from jax_ep import _native, _sockets, config
from jax_ep._bootstrap import Meeting
from jax_ep._drain import drain
from jax_ep._spec import GroupSpec, Seat
from jax_ep.errors import GroupError

_STILL_RUNS = "a program that was launched before it was closed still runs"


class NativeGroup(NamedTuple):
    """What was opened.

    Attributes:
      handle: the native object.
      backend: whose it is.
      why_staged: why operands are copied before peers read them; None: they are read in place.
      staging_bytes: of one call, then; the back end cannot carry more.
      has_packets: whether 16 bytes arrive at once at a peer.
    """

    handle: Any
    backend: str
    why_staged: str | None = None
    staging_bytes: int | None = None
    has_packets: bool = True

    def abandon(self) -> None:
        """The group's end does not wait for the devices: after a loss, or in a forked child."""
        if self.backend == "cuda":
            self.handle.abandon()

    def close(self, spec: GroupSpec) -> None:
        """Forgets the group; executables that hold it keep it alive."""
        _native.load(self.backend).close_group(spec.identity)


class Opening:
    """One process's part in opening a group; collective over the processes of the mesh."""

    def __init__(
        self,
        mesh: jax.sharding.Mesh,
        spec: GroupSpec,
        meeting: Meeting,
        timeout: float,
    ):
        self._mesh = mesh
        self._spec = spec
        self._meeting = meeting
        self._timeout = timeout
        self._timeout_ms = math.ceil(timeout * 1000)
        near = {jax.process_index(), *meeting.neighbours}
        devices = list(mesh.devices.flat)
        seats = [seat for seat in spec.seats() if devices[seat.position].process_index in near]
        slices = sorted({seat.slice for seat in seats})
        # What this process has to do with: seats of others are in its slices, or in theirs.
        self._seats = [seat._replace(slice=slices.index(seat.slice)) for seat in seats]
        self._devices = [devices[seat.position] for seat in seats]

    def open_cpu(self) -> NativeGroup:
        """Over CPU devices."""
        if _native.load("cpu").has_closed_group(self._spec.identity) and not self._drain():
            raise GroupError(f"Group.open: {_STILL_RUNS}")
        handle = self._open("cpu", self._seats, **self._processes())
        if self._meeting.neighbours:
            self._meeting.asks_for_others = handle.has_other_processes
        return NativeGroup(handle, "cpu")

    def open_cuda(self) -> NativeGroup | str:
        """Over GPUs; or why the processes cannot map one another's memory."""
        opened = self._open_or_reopen_cuda()
        if isinstance(opened, str):
            return opened
        atomics = self._meeting.gather("native atomics", opened.handle.has_native_atomics)
        return opened._replace(has_packets=all(atomics.values()))

    def _open_or_reopen_cuda(self) -> NativeGroup | str:
        spare, most = config.staging_bytes_from_environment()
        self._meeting.agree("staging", {"the room for staged operands": [spare, most]})
        grows = config.why_pool_grows() if self._meeting.crosses_processes else None
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
        if not self._meeting.crosses_processes:
            return group
        group, why_not = self._share(group, with_pools=False)
        return group if why_not is None else why_not

    def _reopen_cuda(self, why_staged: str | None, spare: int, most: int) -> NativeGroup | None:
        """The group as it was before it was closed, in the memory that captured programs refer to.

        None where no executable holds it in one of the processes, or where it was open in another
        way: the programs compiled with it then raise at their next launch.
        """
        native = _native.register("cuda")
        closed = native.find_closed_group(self._spec.identity)
        is_usable = closed is not None and (
            closed.staging_bytes == most
            if closed.stages_all
            else why_staged is None and closed.staging_bytes == spare
        )
        if not all(self._meeting.gather("closed group", is_usable).values()):
            return None
        # Whoever clears signals must be sure that no call of a peer is under way.
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
            return NativeGroup(closed, "cuda")
        why = why_staged or "as when the group was opened first"
        return NativeGroup(closed, "cuda", why, closed.staging_bytes)

    def _first_problem(self, topic: str, problem: str) -> str | None:
        if self._meeting.is_alone:
            return problem or None
        return self._meeting.first_problem(topic, problem)

    def _drain(self) -> bool:
        """Whether what was launched on the mesh's devices of this process has ended in time."""
        devices = [d for d in self._devices if _is_here(d)]
        return drain(devices, timeout=self._timeout)

    def _find_pools(self, group: NativeGroup) -> str | None:
        """Lets peers read XLA's memory in place; the group is closed where they cannot."""
        if self._meeting.crosses_processes:
            return self._share(group, with_pools=True)[1]
        problem = ""
        for seat, device in enumerate(self._devices):
            buffer = jax.device_put(np.zeros(1, np.float32), device)
            if not group.handle.find_pool(seat, buffer.unsafe_buffer_pointer()):
                problem = f"the memory that XLA gives on {device} is not mapped for its peers"
                break
        found = self._first_problem("pools", problem)
        if found is not None:
            group.close(self._spec)
        return found

    def _share(self, group: NativeGroup, *, with_pools: bool) -> tuple[NativeGroup, str | None]:
        """The group, closed if its memory cannot be shared, and why."""
        try:
            why_not = _share_devices(
                self._meeting, group.handle, self._devices, with_pools=with_pools
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
                seat._replace(device=_native.cuda_device_of(d) if _is_here(d) else -1)
                for seat, d in zip(self._seats, self._devices, strict=True)
            ],
            is_here=[_is_here(d) for d in self._devices],
            staging_bytes=staging_bytes,
            stages_all=why_staged is not None,
        )
        handle.join_interrupts(_native.load("cpu").interrupts())
        return NativeGroup(
            handle, "cuda", why_staged, None if why_staged is None else staging_bytes
        )

    def _open(self, backend: str, seats: list[Seat], **own: Any) -> Any:
        try:
            native = _native.register(backend)
            if "links" in own:
                self._meeting.hand_over()
            return native.open_group(
                identity=self._spec.identity,
                positions=seats,
                num_slices=len(seats) // self._spec.num_ranks,
                num_ranks=self._spec.num_ranks,
                timeout_ms=self._timeout_ms,
                **own,
            )
        except (RuntimeError, ValueError) as e:
            raise GroupError(f"Group.open: back end {backend!r}: {e}") from e

    def _processes(self) -> dict[str, Any]:
        """What the CPU's native group must know of them; it takes the sockets over."""
        if not self._meeting.neighbours:
            return {}
        return {
            "processes": [d.process_index for d in self._devices],
            "own_process": jax.process_index(),
            "links": [
                (link.process, link.pid, link.socket.fileno()) for link in self._meeting.links
            ],
        }


def _is_here(device: jax.Device) -> bool:
    is_here: bool = device.process_index == jax.process_index()
    return is_here


def _share_devices(
    meeting: Meeting, native: Any, devices: Sequence[jax.Device], *, with_pools: bool
) -> str | None:
    """Maps the group's memory on the GPUs of all neighbours into each of them, and XLA's.

    Args:
      meeting: of all processes of the mesh, which take part.
      native: the group.
      devices: of its seats, in their order.
      with_pools: whether XLA's memory is mapped, as the native group was opened for.

    Returns why that cannot be done, the same in all processes, or None.
    """
    topic = "pools" if with_pools else "signals"
    numbers = []
    own: list[int] = []  # descriptors to close
    held: list[int] = []
    problem, is_echo = "", False
    try:
        try:
            for seat, device in enumerate(devices):
                if _is_here(device):
                    buffer = jax.device_put(np.zeros(1, np.float32), device)
                    address = buffer.unsafe_buffer_pointer()
                    told, control, pool = native.export_position(seat, address)
                    numbers.append((seat, told))
                    own += [control, pool] if with_pools else [control]
        except RuntimeError as e:
            problem = str(e)
        why_not = meeting.first_problem(f"exports of {topic}", problem)
        if why_not is not None:
            return why_not
        try:
            swapped = _swap(meeting, numbers, own, held)
            for seats, received in swapped.values():
                controls = received[::2] if with_pools else received
                pools = received[1::2] if with_pools else [-1] * len(received)
                for (seat, told), control, pool in zip(seats, controls, pools, strict=True):
                    for descriptor in {control, pool} - {-1}:
                        held.remove(descriptor)
                    native.import_position(seat, told, control, pool)
        except (OSError, RuntimeError, ValueError) as e:
            problem, is_echo = str(e), isinstance(e, (ConnectionError, TimeoutError))
        why_not = meeting.first_problem(f"mapping of {topic}", problem, is_echo=is_echo)
    finally:
        for descriptor in own + held:
            os.close(descriptor)
    if why_not is None:
        native.complete()
    return why_not


def _swap(
    meeting: Meeting, numbers: Any, own: list[int], held: list[int]
) -> dict[int, tuple[Any, list[int]]]:
    try:
        return _sockets.swap(meeting.links, numbers, own, held, timeout=meeting.sockets_timeout)
    except OSError:
        # The others need not wait for the rest, and nobody may take it for another message.
        for link in meeting.links:
            with suppress(OSError):
                link.socket.shutdown(socket.SHUT_RDWR)
        raise
