"""Sockets between the processes of a host. Threads play the processes, and strangers call."""

import fcntl
import os
import secrets
import socket
import struct
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from typing import Any

import pytest

from jax_ep._src.processes import unix_links

TIMEOUT = 60.0


class Process:
    """A thread that plays one of several processes that connect."""

    def __init__(self, index, num_processes):
        self.index = index
        self.listener, self.address = unix_links.listen(num_processes)
        self.token = secrets.token_bytes(unix_links.TOKEN_BYTES)
        self.links = []

    def connect(self, processes, *, timeout=TIMEOUT, is_in_vain=lambda: False):
        unix_links.connect(
            self.listener,
            process=self.index,
            token=self.token,
            others={p.index: (p.address, p.token) for p in processes if p is not self},
            timeout=timeout,
            links=self.links,
            is_in_vain=is_in_vain,
        )
        return sorted(link.process for link in self.links)

    def close(self):
        self.listener.close()
        for link in self.links:
            link.socket.close()


@pytest.fixture
def processes():
    found = [Process(index, 3) for index in range(3)]
    yield found
    for process in found:
        process.close()


def _connect_all(processes):
    with ThreadPoolExecutor(len(processes)) as pool:
        return list(pool.map(lambda p: p.connect(processes), processes))


def _strangers(stack, address, count, say=b""):
    """Connects up to `count` strangers, as many as there is room for."""
    for _ in range(count):
        stranger = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        stranger.setblocking(False)
        try:
            stranger.connect("\0" + address)
        except BlockingIOError:
            return
        with suppress(BrokenPipeError, ConnectionResetError):  # the listener may hang up first
            stranger.sendall(say)


@pytest.mark.parametrize("count", [5, 1000])
def test_silent_strangers_delay_no_process(processes, count):
    """If strangers take all the room of a listener, callers try again."""
    with ExitStack() as stack:
        for process in processes:
            _strangers(stack, process.address, count)
        start = time.monotonic()
        assert _connect_all(processes) == [[1, 2], [0, 2], [0, 1]]
        assert time.monotonic() - start < TIMEOUT / 4


def test_talking_strangers_are_not_taken_for_processes(processes):
    hello = struct.Struct(f"!i{unix_links.TOKEN_BYTES}s")
    with ExitStack() as stack:
        for process in processes:
            stranger = hello.pack(2, secrets.token_bytes(unix_links.TOKEN_BYTES))
            itself = hello.pack(process.index, process.token)
            for said in (stranger, stranger[:7], itself, b"\xff" * 1000):
                _strangers(stack, process.address, 1, said)
        assert _connect_all(processes) == [[1, 2], [0, 2], [0, 1]]


def test_links_pass_bytes_and_descriptors_that_no_started_program_gets(processes):
    _connect_all(processes)

    def swap(process):
        held: list[Any] = []
        own = os.memfd_create("own", 0)  # an inheritable descriptor
        try:
            links = process.links
            got = unix_links.swap(links, [process.index], [own], held, timeout=TIMEOUT)
            assert len(held) == len(links)
            for fd in held:
                assert fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
            return {p: message for p, (message, _) in got.items()}
        finally:
            for fd in [own, *held]:
                os.close(fd)

    for process in processes:
        for descriptor in (process.listener, *(link.socket for link in process.links)):
            assert not descriptor.get_inheritable()
        for link in process.links:
            assert link.socket.gettimeout() is None
            assert link.pid == os.getpid()
    with ThreadPoolExecutor(3) as pool:
        got = list(pool.map(swap, processes))
    assert got == [{1: [1], 2: [2]}, {0: [0], 2: [2]}, {0: [0], 1: [1]}]


def test_a_late_listener_is_called_again(processes):
    address = processes[0].address
    processes[0].listener.close()
    with ThreadPoolExecutor(3) as pool:
        others = [pool.submit(p.connect, processes) for p in processes[1:]]
        time.sleep(0.1)
        processes[0].listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        processes[0].listener.bind("\0" + address)
        processes[0].listener.listen(10)
        assert processes[0].connect(processes) == [1, 2]
        assert [future.result() for future in others] == [[0, 2], [0, 1]]


@pytest.mark.parametrize("is_in_vain", [False, True])
def test_a_missing_process_is_named(processes, is_in_vain):
    """The error comes when the time is up, or as soon as another process has given up."""
    first, second, _ = processes
    timeout = TIMEOUT if is_in_vain else 0.5
    start = time.monotonic()
    with ThreadPoolExecutor(2) as pool:
        both = [
            pool.submit(p.connect, processes, timeout=timeout, is_in_vain=lambda: is_in_vain)
            for p in (first, second)
        ]
        for future in both:
            with pytest.raises(TimeoutError, match=r"processes \[2\] .*(call|vain)"):
                future.result()
    assert time.monotonic() - start < TIMEOUT / 4


def test_a_stranger_that_calls_on_keeps_no_process_away(processes):
    """More callers stay than there is room for, so the listener hangs up on the oldest."""
    with ExitStack() as stack, ThreadPoolExecutor(4) as pool:
        is_over: list[bool] = []

        def call_on():
            while not is_over:
                _strangers(stack, processes[0].address, 10)

        calling = pool.submit(call_on)
        try:
            connecting = [pool.submit(p.connect, processes) for p in processes]
            assert [future.result() for future in connecting] == [[1, 2], [0, 2], [0, 1]]
        finally:
            is_over.append(True)
            calling.result()
