"""How the processes of a group find each other, through JAX's distributed runtime.

No XLA collective carries these messages: a group may be of a part of the processes, and NCCL
refuses two ranks on one GPU.
"""

import atexit
import ctypes
import hmac
import json
import os
import secrets
import socket
import struct
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jax_ep import _jax_compat, _native, _registry, config
from jax_ep.errors import GroupError

_TOKEN_BYTES = 32
_HELLO = struct.Struct(f"!i{_TOKEN_BYTES}s")  # process, the other side's token
_LENGTH = struct.Struct("!I")
_MAX_DESCRIPTORS = 128  # in one message
_LEAVE_S, _LEAVE_POLL_S = 5.0, 0.05
_CREDENTIALS = struct.Struct("iii")  # pid, uid, gid; SO_PEERCRED


class Link(NamedTuple):
    """A connected stream socket to another process of this host.

    Attributes:
      process: its index in JAX.
      pid: as this process sees it.
      socket: both sides have shown that they are of this user, and of this group.
    """

    process: int
    pid: int
    socket: socket.socket


class Meeting:
    """The processes of one group. Every method is collective over them unless it says otherwise.

    Attributes:
      processes: their indices in JAX.
      links: to the others, after `connect`.
      why_not_linked: or why there are none.
    """

    def __init__(self, identity: str, processes: Sequence[int], *, timeout: float):
        self.processes = processes
        self.links: list[Link] = []
        self.why_not_linked: str | None = None
        self._prefix = f"jax_ep/{identity}/{_registry.count_opening(identity)}"
        self._timeout = timeout

    def gather(self, topic: str, message: Any) -> dict[int, Any]:
        """What each process says about a topic, as JSON; once for each topic.

        Raises: GroupError, naming a process that says nothing within the timeout.
        """
        client = _jax_compat.distributed_client()
        if client is None:
            raise GroupError(
                "Group.open: the mesh spans processes, but jax.distributed was not initialised"
            )
        key = f"{self._prefix}/{topic}"
        client.key_value_set(f"{key}/{jax.process_index()}", json.dumps(message))
        deadline = time.monotonic() + self._timeout
        said = {}
        for process in self.processes:
            remaining_ms = max(1, int(1000 * (deadline - time.monotonic())))
            try:
                text = client.blocking_key_value_get(f"{key}/{process}", remaining_ms)
            except jax.errors.JaxRuntimeError as e:
                raise GroupError(
                    f"Group.open: process {process} did not open the same group (name, axes, "
                    f"devices) within {self._timeout:g} s: {e}"
                ) from e
            said[process] = json.loads(text)
        return said

    def agree(self, topic: str, settings: Mapping[str, Any]) -> None:
        """Raises GroupError in every process if they open the group with different settings."""
        theirs = self.gather(topic, dict(settings))
        for name, own in settings.items():
            values = {process: said[name] for process, said in theirs.items()}
            if any(value != own for value in values.values()):
                listed = ", ".join(f"process {p} has {v!r}" for p, v in values.items())
                raise GroupError(f"Group.open: the processes disagree about {name}: {listed}")

    def connect(self, *, reads_memory: bool) -> None:
        """Links this process to all others, or says in all of them why not.

        `reads_memory`: only if each can read every other one's memory.
        """
        token = secrets.token_bytes(_TOKEN_BYTES)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            # In the abstract namespace: there is no file, and nothing is left behind.
            listener.bind(f"\0jax_ep-{secrets.token_hex(16)}")
            listener.listen(len(self.processes))
            mine = {
                "host": _host(),
                "address": listener.getsockname()[1:].decode(),
                "token": token.hex(),
            }
            said = self.gather("address", mine)
            hosts = {process: told["host"] for process, told in said.items()}
            if len(set(hosts.values())) > 1:
                self.why_not_linked = f"the mesh spans hosts or containers: {hosts}"
                return
            problem = ""
            try:
                self._link(listener, token, said)
            except OSError as e:
                problem = f"no connection between the processes: {e}"
        self.why_not_linked = self.first_problem("links", problem)
        if self.why_not_linked is None and reads_memory:
            self.why_not_linked = self._first_unreadable()
        if self.why_not_linked is not None:
            self.close()

    def close(self) -> None:
        """Closes the sockets that nobody has taken over. Not collective."""
        for link in self.links:
            link.socket.close()
        self.links = []

    def has_others(self) -> bool:
        """Whether another process is still there, as far as is known. Not collective."""
        for link in self.links:
            try:
                if link.socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT):
                    return True
            except BlockingIOError:
                return True
            except OSError:
                pass
        return False

    def swap(self, message: Any, descriptors: Sequence[int]) -> dict[int, tuple[Any, list[int]]]:
        """What each other process sends to all: something that JSON holds, and descriptors.

        The receiver closes them.
        """
        text = json.dumps(message).encode()
        framed = _LENGTH.pack(len(text)) + text
        for link in self.links:
            link.socket.settimeout(self._timeout)
            sent = socket.send_fds(link.socket, [framed], descriptors)
            link.socket.sendall(framed[sent:])
        got = {}
        for link in self.links:
            data, received, _, _ = socket.recv_fds(link.socket, _LENGTH.size, _MAX_DESCRIPTORS)
            if len(data) < _LENGTH.size:
                raise GroupError(f"Group.open: process {link.process} has ended")
            (length,) = _LENGTH.unpack(data)
            text = link.socket.recv(length, socket.MSG_WAITALL)
            got[link.process] = json.loads(text), received
            link.socket.settimeout(None)
        return got

    def _link(self, listener: socket.socket, token: bytes, said: Mapping[int, Any]) -> None:
        """Calls those before this process, is called by those behind it."""
        me = jax.process_index()
        deadline = time.monotonic() + self._timeout
        for process in self.processes:
            if process == me:
                continue
            if process < me:
                link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                link.settimeout(max(0.1, deadline - time.monotonic()))
                link.connect("\0" + said[process]["address"])
                link.sendall(_HELLO.pack(me, bytes.fromhex(said[process]["token"])))
                caller = process
            else:
                listener.settimeout(max(0.1, deadline - time.monotonic()))
                link, _ = listener.accept()
                link.settimeout(max(0.1, deadline - time.monotonic()))
                hello = link.recv(_HELLO.size, socket.MSG_WAITALL)
                caller, shown = _HELLO.unpack(hello.ljust(_HELLO.size, b"\0"))
                if not hmac.compare_digest(shown, token):
                    raise OSError("a caller does not know this process's token")
            link.settimeout(None)
            pid, uid, _ = _CREDENTIALS.unpack(
                link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
            )
            if uid != os.geteuid():
                raise OSError(f"process {caller} is of another user")
            self.links.append(Link(caller, pid, link))

    def _first_unreadable(self) -> str | None:
        """Each process reads a random number out of every other one's memory."""
        native = _native.load("cpu")
        native.allow_readers()
        number = ctypes.c_uint64(secrets.randbits(64))
        said = self.gather("memory", [ctypes.addressof(number), number.value])
        problems = [
            f"the memory of process {link.process} cannot be read: {problem}"
            for link in self.links
            if (problem := native.try_reading(link.pid, *said[link.process])) is not None
        ]
        return self.first_problem("reading", problems[0] if problems else "")

    def first_problem(self, topic: str, problem: str) -> str | None:
        """Of all processes; the same answer in each of them."""
        said = self.gather(topic, problem)
        found = [f"process {process}: {why}" for process, why in said.items() if why]
        return found[0] if found else None


def meet(mesh: jax.sharding.Mesh, identity: str, settings: Mapping[str, Any]) -> Meeting | None:
    """Of a mesh that spans processes: those that open the group with the same settings, linked."""
    processes = sorted({d.process_index for d in mesh.devices.flat})
    if processes == [jax.process_index()]:
        return None
    if settings["timeout"] >= config.JAX_HEARTBEAT_TIMEOUT_S:
        warnings.warn(
            f"Group.open: timeout={settings['timeout']:g} s: JAX aborts processes that wait for "
            f"a lost one after heartbeat_timeout_seconds ({config.JAX_HEARTBEAT_TIMEOUT_S:g} by "
            "default): only below it they get an exception",
            stacklevel=3,
        )
    meeting = Meeting(identity, processes, timeout=settings["timeout"])
    meeting.agree("settings", settings)
    meeting.connect(reads_memory=all(d.platform == "cpu" for d in mesh.devices.flat))
    return meeting


def share_devices(meeting: Meeting, native: Any, mesh: jax.sharding.Mesh) -> None:
    """Maps XLA's memory and the group's signals on the GPUs of all processes into each of them."""
    exports = {}
    for position, device in enumerate(mesh.devices.flat):
        if device.process_index == jax.process_index():
            buffer = jax.device_put(np.zeros(1, np.float32), device)
            exports[position] = native.export_seat(position, buffer.unsafe_buffer_pointer())
    descriptors = [fd for _, *own in exports.values() for fd in own]
    problem = ""
    try:
        numbers = [(position, exported[0]) for position, exported in exports.items()]
        for seats, received in meeting.swap(numbers, descriptors).values():
            for (position, told), *own in zip(seats, received[::2], received[1::2], strict=True):
                native.import_seat(position, told, *own)
    except (OSError, RuntimeError) as e:
        problem = str(e)
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
    why_not = meeting.first_problem("mapping", problem)
    if why_not is not None:
        raise GroupError(f"Group.open: back end 'cuda': memory cannot be mapped: {why_not}")
    native.complete()


def leave_alone_at_exit(has_others: Callable[[], bool]) -> None:
    """After a peer was lost: the interpreter's exit does not wait for all processes of JAX.

    JAX's own shutdown would wait for those that are gone until their heartbeats are missed, and
    abort the process. JAX also aborts processes whose coordinator, process 0, has gone before them:
    it leaves last, unless the others stay for long.

    Args:
      has_others: whether other processes of the group are still there.
    """
    if jax.process_count() == 1:
        return

    def leave() -> None:
        if jax.process_index() == 0:
            deadline = time.monotonic() + _LEAVE_S
            while has_others() and time.monotonic() < deadline:
                time.sleep(_LEAVE_POLL_S)
        _jax_compat.abandon_distributed_runtime()

    atexit.register(leave)


def _host() -> str:
    """Equal in processes that reach each other's sockets and see each other's pids."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    spaces = [os.readlink(f"/proc/self/ns/{space}") for space in ("net", "pid", "user")]
    return " ".join([boot, *spaces])
