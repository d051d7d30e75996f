"""Starts programs of several processes on this machine, and ends all of them whatever happens."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from types import FrameType
from typing import IO

import jax

from jax_ep._src.base.config import ProcessPlace, virtual_devices_environment
from jax_ep._src.base.errors import LaunchError

_POLL_S = 0.02
_DUMP_S = 5.0
_TAIL_CHARS = 6000


def count_gpus() -> int:
    """Counts the NVIDIA GPUs that a child process would see, without starting JAX on them."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return 0
    listed = subprocess.run([tool, "-L"], capture_output=True, text=True, check=False)
    num_gpus = listed.stdout.count("UUID")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return num_gpus
    return min(num_gpus, sum(bool(name.strip()) for name in visible.split(",")))


def initialize() -> None:
    """Joins the program that `launch` started, by `jax.distributed.initialize`.

    If there are GPUs, the processes get equal parts of them. If there are more processes than
    GPUs, each process gets one, in turns.

    Raises: ConfigError outside such a program.
    """
    place = ProcessPlace.from_environment()
    num_gpus = count_gpus()
    share = max(1, num_gpus // place.num_processes)
    first = place.process_id * share
    own = [(first + i) % num_gpus for i in range(share)] if num_gpus else None
    jax.distributed.initialize(
        place.coordinator, place.num_processes, place.process_id, local_device_ids=own
    )


def launch(
    argv: Sequence[str],
    *,
    num_processes: int,
    deadline: float,
    num_devices: int | None = None,
    environment: Mapping[str, str] | None = None,
    exit_codes: Sequence[int] | None = None,
) -> list[str]:
    """Runs one Python program in several processes that find each other by `initialize()`.

    Each process leads a session of its own. None of a session's processes outlives the call, nor a
    SIGTERM to this one, if the call is made by its main thread. A session keeps children whose
    parent has ended, which a tree of processes, as psutil finds it, loses.

    Args:
      argv: arguments of this Python: a script, or "-c" and code, or "-m" and a module, and what
        they take.
      num_processes: the number of processes.
      deadline: seconds for all of them together.
      num_devices: virtual CPU devices of each process; None: as its environment says, or its own
        call of `virtual_devices`.
      environment: variables to set on top of this process's.
      exit_codes: the code that each process must end with, or minus a signal's number; None: 0.

    Returns:
      The output of each process, stdout and stderr, in the order of their ids.

    Raises:
      LaunchError: a process ended with another code, and the others were killed, or the deadline
        passed, and all were killed. It holds every exit code, the end of every output, and the
        Python tracebacks of the killed processes, without those of their children.
    """
    coordinator = f"localhost:{_free_port()}"
    environment = dict(environment or {})
    if num_devices is not None:
        environment |= virtual_devices_environment(num_devices)
    with ExitStack() as stack:
        stack.enter_context(_exits_by_sigterm())
        processes = []
        for process_id in range(num_processes):
            place = ProcessPlace(coordinator, num_processes, process_id)
            output = stack.enter_context(tempfile.TemporaryFile())
            process = _start(argv, {**environment, **place.to_environment()}, output)
            stack.callback(process.end)
            processes.append(process)
        problem = _wait(processes, exit_codes or [0] * num_processes, deadline)
        if problem is not None:
            _abort(processes)
            reports = [_report(i, process) for i, process in enumerate(processes)]
            raise LaunchError("\n".join([f"launch: {problem}", *reports]))
        return [process.read() for process in processes]


@dataclass
class _Process:
    """Reaped at the very end: until then its id, and so that of its session, is not given away."""

    popen: "subprocess.Popen[bytes]"
    output: IO[bytes]
    is_killed: bool = False

    def exit_code(self) -> int | None:
        """None while it runs; minus the signal that ended it."""
        flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
        status = os.waitid(os.P_PID, self.popen.pid, flags)
        if status is None:
            return None
        return status.si_status if status.si_code == os.CLD_EXITED else -status.si_status

    def signal_all(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.popen.pid, number)

    def end(self) -> None:
        self.signal_all(signal.SIGKILL)
        self.popen.wait()

    def read(self) -> str:
        self.output.seek(0)
        return self.output.read().decode(errors="replace")


@contextmanager
def _exits_by_sigterm() -> Iterator[None]:
    """Turns SIGTERM into an exception, so that everything on the stack is ended first."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port: int = probe.getsockname()[1]
        return port


def _start(argv: Sequence[str], environment: Mapping[str, str], output: IO[bytes]) -> _Process:
    popen = subprocess.Popen(
        [sys.executable, *argv],
        env={**os.environ, "PYTHONFAULTHANDLER": "1", "PYTHONUNBUFFERED": "1", **environment},
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    return _Process(popen, output)


def _wait(processes: Sequence[_Process], exit_codes: Sequence[int], deadline: float) -> str | None:
    """Until all have ended well, or for what is wrong."""
    end = time.monotonic() + deadline
    while True:
        codes = [process.exit_code() for process in processes]
        bad = [
            f"process {i} ended with code {code}"
            for i, (code, expected) in enumerate(zip(codes, exit_codes, strict=True))
            if code not in (None, expected)
        ]
        if bad:
            return ", ".join(bad)
        if None not in codes:
            return None
        if time.monotonic() > end:
            late = ", ".join(str(i) for i, code in enumerate(codes) if code is None)
            return f"processes {late} did not end within {deadline:g} s"
        time.sleep(_POLL_S)


def _abort(processes: Sequence[_Process]) -> None:
    """Ends what runs, by the signal at which Python's fault handler writes all tracebacks."""
    for process in processes:
        if process.exit_code() is None:
            process.is_killed = True
            # Not its children, whose tracebacks would be written into the same lines.
            os.kill(process.popen.pid, signal.SIGABRT)
    end = time.monotonic() + _DUMP_S
    while time.monotonic() < end and any(p.exit_code() is None for p in processes):
        time.sleep(_POLL_S)
    for process in processes:
        process.signal_all(signal.SIGKILL)


def _report(process_id: int, process: _Process) -> str:
    code = "killed by launch" if process.is_killed else f"exit code {process.exit_code()}"
    text = process.read()
    if len(text) > _TAIL_CHARS:
        text = "...\n" + text[-_TAIL_CHARS:]
    return f"--- process {process_id}: {code}\n{text.rstrip()}"
