"""Sockets between the processes of one host, and descriptors that pass over them.

Not multiprocessing.connection: it unpickles what a stranger sends, and waits without a limit.
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
_RETRY_S, _LOOK_S = 0.01, 0.2  # between two calls in vain; between two looks at the others
_CREDENTIALS = struct.Struct("iii")  # pid, uid, gid; SO_PEERCRED
_LENGTH = struct.Struct("!I")
_MAX_DESCRIPTORS = 128  # in one message


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


def listen(num_processes: int) -> tuple[socket.socket, str]:
    """A socket that so many processes of this host, and strangers, can connect to; its address.

    In the abstract namespace: there is no file, and nothing is left behind.
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
    """Connects each pair of processes: calls those before this one, is called by those behind it.

    Args:
      listener: of this process.
      process: this one.
      token: what callers must show.
      others: address and token of each of the others.
      timeout: seconds for all of them.
      links: gets the links, even when it raises.
      is_in_vain: asked now and then while others are waited for: whether one of them has given up.

    Raises: TimeoutError where another process did not answer or call, or has given up; OSError.
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
                    raise TimeoutError(f"processes {missing} are waited for in vain")
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
    """What each other process sends to all: something that JSON holds, and descriptors.

    `timeout`: seconds for all of them. `held` gets all descriptors that were received, even when it
    raises OSError; the caller closes them. No program that this process starts gets them.
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
    """Whether another process is still there, as far as is known."""
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
    """A descriptor for `has_ended`; None where the system has none."""
    try:
        return os.pidfd_open(pid)
    except OSError:
        return None


def has_ended(watch: int) -> bool:
    """Whether a process is no more, or waits to be reaped."""
    poll = select.poll()
    poll.register(watch, select.POLLIN)
    return bool(poll.poll(0))


def host() -> str:
    """Equal in processes that reach each other's sockets and see each other's pids."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    spaces = [os.readlink(f"/proc/self/ns/{space}") for space in ("net", "pid", "user")]
    return " ".join([boot, *spaces])


def _pid_of_own_user(link: socket.socket) -> int | None:
    """Of the process at the other end; None if it is of another user."""
    raw = link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, _ = _CREDENTIALS.unpack(raw)
    return int(pid) if uid == os.geteuid() else None


def _room_for_callers(num_processes: int) -> int:
    """Room for callers that nobody has listened to yet: each process, and some strangers."""
    return 4 * num_processes + 64


def _call(process: int, address: str, hello: bytes) -> Link | None:
    """None: not now. Its backlog is full of strangers, or it listens no more."""
    with ExitStack() as stack:
        link = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        link.setblocking(False)
        try:
            link.connect("\0" + address)
            pid = _pid_of_own_user(link)
            if pid is None:
                raise PermissionError(f"who listens for process {process} is of another user")
            link.sendall(hello)  # into an empty buffer
        except (BlockingIOError, ConnectionError):
            return None
        link.settimeout(None)
        stack.pop_all()
    return Link(process, pid, link)


class _Caller(NamedTuple):
    """Somebody of this user who has not yet said all of its hello, until the deadline."""

    pid: int
    heard: bytearray
    deadline: float


class _Callers:
    """Whoever connects to a listener, until it has said who it is.

    Anyone on this host may connect and say nothing, so none of them is waited for alone.
    """

    def __init__(self, listener: socket.socket, token: bytes, *, room: int):
        """`token`: what a caller must show. `room`: for so many; a new one displaces the oldest."""
        listener.setblocking(False)
        self._listener = listener
        self._token = token
        self._room = room
        self._silent: dict[socket.socket, _Caller] = {}  # the oldest first

    def admit(self, pause: float) -> list[Link]:
        """Those that have shown the token since the last call; waits for any, at most `pause`."""
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
        """Hangs up on those that are still silent."""
        for caller in list(self._silent):
            self._forget(caller)

    def _accept(self) -> None:
        for _ in range(self._room):  # more may come for ever
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
    """What is done with the socket from now on raises TimeoutError when the time is up."""
    link.settimeout(max(0.001, deadline - time.monotonic()))


def _receive_descriptors(link: socket.socket, size: int) -> tuple[bytes, list[int], bool]:
    """At most so many bytes, descriptors beside them, and whether these are all.

    Closed in programs that are started, which socket.recv_fds cannot do: it drops its flags.
    """
    found = array("i")
    room = socket.CMSG_LEN(_MAX_DESCRIPTORS * found.itemsize)
    data, beside, flags, _ = link.recvmsg(size, room, socket.MSG_CMSG_CLOEXEC)
    for level, kind, content in beside:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            found.frombytes(content[: len(content) // found.itemsize * found.itemsize])
    return data, found.tolist(), not flags & socket.MSG_CTRUNC


def _receive(link: socket.socket, size: int) -> bytes:
    """Exactly so many bytes."""
    data = b""
    while len(data) < size:
        part = link.recv(size - len(data))
        if not part:
            raise ConnectionError("the other process has closed the connection")
        data += part
    return data
