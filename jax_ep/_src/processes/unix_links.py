"""Sockets between the processes of one host. File descriptors pass over them.

multiprocessing.connection would not do: it unpickles messages of strangers, and waits without a
limit.
"""

import hmac
import json
import os
import secrets
import select
import socket
import struct
import time
from array import array
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

TOKEN_BYTES = 32
_HELLO = struct.Struct(f"!i{TOKEN_BYTES}s")  # process, the other side's token
_HELLO_S = 5.0
_RETRY_S, _LOOK_S = 0.01, 0.2  # between two failed calls; between two looks for other failures
_CREDENTIALS = struct.Struct("iii")  # pid, uid, gid; SO_PEERCRED
_LENGTH = struct.Struct("!I")
_MAX_DESCRIPTORS = 128  # in one message


class Link(NamedTuple):
    """A connected stream socket to another process of this host.

    Attributes:
      process: index of the other process in JAX.
      pid: pid of the other process, as this process sees it.
      socket: the socket; both sides have shown that they belong to this user and this group.
    """

    process: int
    pid: int
    socket: socket.socket


def listen(num_processes: int) -> tuple[socket.socket, str]:
    """Returns a listening socket and its address; its backlog has room for strangers, too.

    The address is in the abstract namespace: no file is made, so no file is left behind.
    """
    address = f"jax_ep-{secrets.token_hex(16)}"
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind("\0" + address)
        listener.listen(_room_for_callers(num_processes))
    except OSError:
        listener.close()
        raise
    return listener, address


def connect(
    listener: socket.socket,
    *,
    process: int,
    token: bytes,
    others: Mapping[int, tuple[str, bytes]],
    timeout: float,
    links: list[Link],
    is_in_vain: Callable[[], bool],
) -> None:
    """Connects this process to the others. In each pair the process of higher index calls.

    Args:
      listener: socket of this process.
      process: index of this process.
      token: token that callers must show.
      others: address and token of each other process.
      timeout: seconds for all connections together.
      links: gets the links, even when the function raises.
      is_in_vain: tells whether another process has given up; called now and then during the wait.

    Raises: TimeoutError if another process did not answer or call, or has given up; OSError.
    """
    deadline = time.monotonic() + timeout
    next_look = time.monotonic() + _LOOK_S
    to_call = {other: told for other, told in others.items() if other < process}
    to_come = {other for other in others if other > process}
    with ExitStack() as stack:
        callers = _Callers(listener, token, room=_room_for_callers(len(others) + 1))
        stack.callback(callers.close)
        while True:
            for other, (address, shown) in list(to_call.items()):
                link = _call(other, address, _HELLO.pack(process, shown))
                if link is not None:
                    links.append(link)
                    del to_call[other]
            missing = sorted(to_call) + sorted(to_come)
            if not missing:
                return
            now = time.monotonic()
            if now > deadline:
                raise TimeoutError(f"processes {missing} could not be reached, or did not call")
            if now > next_look:
                if is_in_vain():
                    raise TimeoutError(f"waited for processes {missing} in vain: one has given up")
                next_look = time.monotonic() + _LOOK_S
            pause = _RETRY_S if to_call else _LOOK_S
            for link in callers.admit(min(pause, deadline - now)):
                if link.process in to_come:
                    to_come.remove(link.process)
                    links.append(link)
                else:
                    link.socket.close()


def swap(
    links: Sequence[Link],
    message: Any,
    descriptors: Sequence[int],
    held: list[int],
    *,
    timeout: float,
) -> dict[int, tuple[Any, list[int]]]:
    """Sends a JSON message and descriptors to all other processes, and returns theirs.

    `timeout`: seconds for all messages together. `held` gets all received descriptors, even when
    the function raises OSError; the caller closes them. Programs that this process starts do not
    inherit them.
    """
    deadline = time.monotonic() + timeout
    text = json.dumps(message).encode()
    framed = _LENGTH.pack(len(text)) + text
    for link in links:
        _wait_until(link.socket, deadline)
        sent = socket.send_fds(link.socket, [framed], descriptors)
        link.socket.sendall(framed[sent:])
    got = {}
    for link in links:
        _wait_until(link.socket, deadline)
        data, received, is_whole = _receive_descriptors(link.socket, _LENGTH.size)
        held += received
        if not is_whole:
            raise OSError(f"descriptors of process {link.process} were cut off")
        (length,) = _LENGTH.unpack(data + _receive(link.socket, _LENGTH.size - len(data)))
        got[link.process] = json.loads(_receive(link.socket, length)), received
        link.socket.settimeout(None)
    return got


def any_is_open(links: Sequence[Link]) -> bool:
    """Returns whether another process is still there, as far as is known."""
    for link in links:
        try:
            if link.socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT):
                return True
        except BlockingIOError:
            return True
        except OSError:
            pass
    return False


def watch_process(pid: int) -> int | None:
    """Returns a descriptor for `has_ended`; None if the system has none."""
    try:
        return os.pidfd_open(pid)
    except OSError:
        return None


def has_ended(watch: int) -> bool:
    """Returns whether a process has ended; it may still wait to be reaped."""
    poll = select.poll()
    poll.register(watch, select.POLLIN)
    return bool(poll.poll(0))


def host() -> str:
    """Returns a name that is equal in processes that share a host, its sockets and its pids."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    spaces = [os.readlink(f"/proc/self/ns/{space}") for space in ("net", "pid", "user")]
    return " ".join([boot, *spaces])


def _pid_of_own_user(link: socket.socket) -> int | None:
    """Returns the pid of the process at the other end; None if it belongs to another user."""
    raw = link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, _ = _CREDENTIALS.unpack(raw)
    return int(pid) if uid == os.geteuid() else None


def _room_for_callers(num_processes: int) -> int:
    """Returns room for callers that wait to be heard: each process, and some strangers."""
    return 4 * num_processes + 64


def _call(process: int, address: str, hello: bytes) -> Link | None:
    """Calls another process; returns None if its backlog is full, or if it has stopped listening.

    Strangers may fill the backlog.
    """
    with ExitStack() as stack:
        link = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        link.setblocking(False)
        try:
            link.connect("\0" + address)
            pid = _pid_of_own_user(link)
            if pid is None:
                raise PermissionError(f"the listener for process {process} is of another user")
            link.sendall(hello)  # into an empty buffer
        except (BlockingIOError, ConnectionError):
            return None
        link.settimeout(None)
        stack.pop_all()
    return Link(process, pid, link)


class _Caller(NamedTuple):
    """A caller of this user that has not yet sent its whole hello; it has until the deadline."""

    pid: int
    heard: bytearray
    deadline: float


class _Callers:
    """Callers that have connected to a listener, but have not yet shown the token.

    Any process of this host may connect and stay silent, so no caller is waited for alone.
    """

    def __init__(self, listener: socket.socket, token: bytes, *, room: int):
        """`token`: token that a caller must show. `room`: limit; then the oldest caller must go."""
        listener.setblocking(False)
        self._listener = listener
        self._token = token
        self._room = room
        self._silent: dict[socket.socket, _Caller] = {}  # the oldest first

    def admit(self, pause: float) -> list[Link]:
        """Returns links to callers that have shown the token; waits at most `pause` seconds."""
        poll = select.poll()
        for waited in (self._listener, *self._silent):
            poll.register(waited, select.POLLIN)
        poll.poll(max(0.0, pause) * 1000)
        self._accept()
        heard = [self._hear(caller) for caller in list(self._silent)]
        for caller in list(self._silent)[: -self._room]:
            self._forget(caller)
        return [link for link in heard if link is not None]

    def close(self) -> None:
        """Hangs up on callers that are still silent."""
        for caller in list(self._silent):
            self._forget(caller)

    def _accept(self) -> None:
        for _ in range(self._room):  # a limit, because callers may come for ever
            try:
                caller, _ = self._listener.accept()
            except BlockingIOError:
                return
            pid = _pid_of_own_user(caller)
            if pid is None:
                caller.close()
                continue
            caller.setblocking(False)
            self._silent[caller] = _Caller(pid, bytearray(), time.monotonic() + _HELLO_S)

    def _hear(self, caller: socket.socket) -> Link | None:
        pid, heard, deadline = self._silent[caller]
        try:
            said = caller.recv(_HELLO.size - len(heard))
        except BlockingIOError:
            if time.monotonic() > deadline:
                self._forget(caller)
            return None
        except OSError:
            said = b""
        heard += said
        if len(heard) == _HELLO.size:
            process, shown = _HELLO.unpack(heard)
            if hmac.compare_digest(shown, self._token):
                del self._silent[caller]
                caller.settimeout(None)
                return Link(process, pid, caller)
            said = b""
        if not said:
            self._forget(caller)
        return None

    def _forget(self, caller: socket.socket) -> None:
        del self._silent[caller]
        caller.close()


def _wait_until(link: socket.socket, deadline: float) -> None:
    """Makes operations on the socket raise TimeoutError after the deadline."""
    link.settimeout(max(0.001, deadline - time.monotonic()))


def _receive_descriptors(link: socket.socket, size: int) -> tuple[bytes, list[int], bool]:
    """Returns at most `size` bytes, the descriptors with them, and whether none was cut off.

    Programs that this process starts do not inherit the descriptors. socket.recv_fds cannot ask
    for that: it drops its flags.
    """
    found = array("i")
    room = socket.CMSG_LEN(_MAX_DESCRIPTORS * found.itemsize)
    data, beside, flags, _ = link.recvmsg(size, room, socket.MSG_CMSG_CLOEXEC)
    for level, kind, content in beside:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            found.frombytes(content[: len(content) // found.itemsize * found.itemsize])
    return data, found.tolist(), not flags & socket.MSG_CTRUNC


def _receive(link: socket.socket, size: int) -> bytes:
    """Returns exactly `size` bytes."""
    data = b""
    while len(data) < size:
        part = link.recv(size - len(data))
        if not part:
            raise ConnectionError("the other process has closed the connection")
        data += part
    return data
