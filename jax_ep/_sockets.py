"""Sockets between the processes of one host, and descriptors that pass over them."""

import hmac
import json
import os
import secrets
import select
import socket
import struct
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

TOKEN_BYTES = 32
_HELLO = struct.Struct(f"!i{TOKEN_BYTES}s")  # process, the other side's token
_HELLO_S = 5.0
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


def listen(backlog: int) -> tuple[socket.socket, str]:
    """A socket that others of this host can connect to, and its address.

    In the abstract namespace: there is no file, and nothing is left behind.
    """
    address = f"jax_ep-{secrets.token_hex(16)}"
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind("\0" + address)
        listener.listen(backlog)
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
) -> None:
    """Connects each pair of processes: calls those before this one, is called by those behind it.

    Args:
      listener: of this process.
      process: this one.
      token: what callers must show.
      others: address and token of each of the others.
      timeout: seconds for all of them.
      links: gets the links, even when it raises OSError.
    """
    deadline = time.monotonic() + timeout
    callers = {other for other in others if other > process}
    for other, (address, shown) in others.items():
        if other < process:
            link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            link.settimeout(max(0.1, deadline - time.monotonic()))
            link.connect("\0" + address)
            pid = _pid_of_own_user(link)
            if pid is None:
                raise OSError(f"who listens for process {other} is of another user")
            link.sendall(_HELLO.pack(process, shown))
            link.settimeout(None)
            links.append(Link(other, pid, link))
    while callers:
        if time.monotonic() > deadline:
            raise TimeoutError(f"processes {sorted(callers)} did not call")
        listener.settimeout(max(0.1, deadline - time.monotonic()))
        link, _ = listener.accept()
        pid = _pid_of_own_user(link)
        caller = None if pid is None else _hello(link, token)
        if pid is None or caller not in callers:
            link.close()  # anyone on this host may call
            continue
        callers.remove(caller)
        links.append(Link(caller, pid, link))


def swap(
    links: Sequence[Link],
    message: Any,
    descriptors: Sequence[int],
    held: list[int],
    *,
    timeout: float,
) -> dict[int, tuple[Any, list[int]]]:
    """What each other process sends to all: something that JSON holds, and descriptors.

    `held` gets all that were received, even when it raises OSError; the caller closes them.
    """
    text = json.dumps(message).encode()
    framed = _LENGTH.pack(len(text)) + text
    for link in links:
        link.socket.settimeout(timeout)
        sent = socket.send_fds(link.socket, [framed], descriptors)
        link.socket.sendall(framed[sent:])
    got = {}
    for link in links:
        data, received, flags, _ = socket.recv_fds(link.socket, _LENGTH.size, _MAX_DESCRIPTORS)
        held += received
        if flags & socket.MSG_CTRUNC:
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


def _hello(link: socket.socket, token: bytes) -> int | None:
    """Who calls, if it knows this process's token and says so soon."""
    link.settimeout(_HELLO_S)
    try:
        caller, shown = _HELLO.unpack(_receive(link, _HELLO.size))
    except OSError:
        return None
    link.settimeout(None)
    return int(caller) if hmac.compare_digest(shown, token) else None


def _receive(link: socket.socket, size: int) -> bytes:
    """Exactly so many bytes."""
    data = b""
    while len(data) < size:
        part = link.recv(size - len(data))
        if not part:
            raise ConnectionError("the other process has closed the connection")
        data += part
    return data
