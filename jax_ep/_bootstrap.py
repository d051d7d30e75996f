"""How the processes of a group find each other, through JAX's distributed runtime.

No XLA collective carries these messages: a group may be of a part of the processes, and NCCL
refuses two ranks on one GPU.
"""

import atexit
import ctypes
import json
import os
import secrets
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import Any

import jax
import numpy as np

from jax_ep import _jax_compat, _native, _registry, _sockets, config
from jax_ep.errors import GroupError

_LEAVE_S, _LEAVE_POLL_S = 5.0, 0.05


class Meeting:
    """The processes of one group. Every method is collective over them unless it says otherwise.

    Attributes:
      processes: their indices in JAX.
      links: to the others, after `connect`.
      why_not_linked: or why there are none.
      timeout: seconds to wait for one another.
    """

    def __init__(self, identity: str, processes: Sequence[int], *, timeout: float):
        self.processes = processes
        self.links: list[_sockets.Link] = []
        self.why_not_linked: str | None = None
        self._identity = identity
        self._prefix = f"jax_ep/{identity}/{_registry.count_opening(identity)}"
        self._keys: list[str] = []
        self._waited_in_vain = False
        self.timeout = timeout

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
        own = f"{key}/{jax.process_index()}"
        try:
            client.key_value_set(own, json.dumps(message))
        except jax.errors.JaxRuntimeError as e:
            raise GroupError(f"Group.open: JAX's distributed runtime cannot be reached: {e}") from e
        self._keys.append(own)
        deadline = time.monotonic() + self.timeout
        said = {}
        for process in self.processes:
            remaining_ms = max(1, int(1000 * (deadline - time.monotonic())))
            try:
                text = client.blocking_key_value_get(f"{key}/{process}", remaining_ms)
            except jax.errors.JaxRuntimeError as e:
                self._waited_in_vain = True
                raise GroupError(
                    f"Group.open: process {process} did not open the same group (name, axes, "
                    f"devices) within {self.timeout:g} s: {e}"
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
        me = jax.process_index()
        token = secrets.token_bytes(_sockets.TOKEN_BYTES)
        mine = {"problem": "", "host": "", "address": "", "token": token.hex()}
        listener = None
        try:
            listener, mine["address"] = _sockets.listen(len(self.processes))
            mine["host"] = _sockets.host()
        except OSError as e:
            mine["problem"] = str(e)
        with ExitStack() as stack:
            if listener is not None:
                stack.enter_context(listener)
            said = self.gather("address", mine)
            self.why_not_linked = _first({p: told["problem"] for p, told in said.items()})
            hosts = {p: told["host"] for p, told in said.items()}
            if self.why_not_linked is None and len(set(hosts.values())) > 1:
                self.why_not_linked = f"the mesh spans hosts or containers: {hosts}"
            if self.why_not_linked is not None or listener is None:
                return
            problem = ""
            try:
                _sockets.connect(
                    listener,
                    process=me,
                    token=token,
                    others={
                        p: (told["address"], bytes.fromhex(told["token"]))
                        for p, told in said.items()
                        if p != me
                    },
                    timeout=self.timeout,
                    links=self.links,
                )
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
        return _sockets.any_is_open(self.links)

    def abandon(self) -> None:
        """After a failure: the group may be opened again. Not collective.

        If others did not come in time, it is as if this process had not come either.
        """
        self.close()
        if not self._waited_in_vain:
            return
        client = _jax_compat.distributed_client()
        for key in self._keys:
            with suppress(jax.errors.JaxRuntimeError):
                client.key_value_delete(key)
        _registry.openings[self._identity] -= 1

    def _first_unreadable(self) -> str | None:
        """Each process reads a random number out of every other one's memory."""
        number = ctypes.c_uint64(secrets.randbits(64))
        problem = ""
        try:
            native = _native.load("cpu")
            native.allow_readers()
        except GroupError as e:
            problem = str(e)
        said = self.gather("memory", [problem, ctypes.addressof(number), number.value])
        missing = _first({process: told[0] for process, told in said.items()})
        if missing is not None:
            return missing
        problems = [
            f"the memory of process {link.process} cannot be read: {problem}"
            for link in self.links
            if (problem := native.try_reading(link.pid, *said[link.process][1:])) is not None
        ]
        return self.first_problem("reading", problems[0] if problems else "")

    def first_problem(self, topic: str, problem: str) -> str | None:
        """Of all processes; the same answer in each of them."""
        return _first(self.gather(topic, problem))


def _first(problems: Mapping[int, str]) -> str | None:
    found = [f"process {process}: {problem}" for process, problem in problems.items() if problem]
    return found[0] if found else None


def meet(mesh: jax.sharding.Mesh, identity: str, settings: Mapping[str, Any]) -> Meeting | None:
    """Of a mesh that spans processes: those that open the group with the same settings, linked."""
    processes = sorted({d.process_index for d in mesh.devices.flat})
    if processes == [jax.process_index()]:
        return None
    if jax.process_index() not in processes:
        raise GroupError(
            f"Group.open: process {jax.process_index()} has no device of the mesh; only processes "
            f"{processes} open this group"
        )
    if settings["timeout"] >= config.JAX_HEARTBEAT_TIMEOUT_S:
        warnings.warn(
            f"Group.open: timeout={settings['timeout']:g} s: JAX aborts processes that wait for "
            f"a lost one after heartbeat_timeout_seconds ({config.JAX_HEARTBEAT_TIMEOUT_S:g} by "
            "default): only below it they get an exception",
            stacklevel=3,
        )
    meeting = Meeting(identity, processes, timeout=settings["timeout"])
    try:
        meeting.agree("settings", settings)
        meeting.connect(reads_memory=all(d.platform == "cpu" for d in mesh.devices.flat))
    except BaseException:
        meeting.abandon()
        raise
    return meeting


def share_devices(
    meeting: Meeting, native: Any, mesh: jax.sharding.Mesh, *, with_pools: bool
) -> str | None:
    """Maps the group's memory on the GPUs of all processes into each of them, and XLA's.

    `with_pools`: whether XLA's is, as the native group was opened for.

    Returns why that cannot be done, the same in all processes, or None.
    """
    topic = "pools" if with_pools else "signals"
    numbers = []
    own: list[int] = []  # descriptors to close
    held: list[int] = []
    problem = ""
    try:
        for position, device in enumerate(mesh.devices.flat):
            if device.process_index == jax.process_index():
                buffer = jax.device_put(np.zeros(1, np.float32), device)
                told, control, pool = native.export_seat(position, buffer.unsafe_buffer_pointer())
                numbers.append((position, told))
                own += [control, pool] if with_pools else [control]
    except RuntimeError as e:
        problem = str(e)
    try:
        why_not = meeting.first_problem(f"exports of {topic}", problem)
        if why_not is not None:
            return why_not
        try:
            swapped = _sockets.swap(meeting.links, numbers, own, held, timeout=meeting.timeout)
            for seats, received in swapped.values():
                controls = received[::2] if with_pools else received
                pools = received[1::2] if with_pools else [-1] * len(received)
                for (position, told), control, pool in zip(seats, controls, pools, strict=True):
                    for descriptor in {control, pool} - {-1}:
                        held.remove(descriptor)
                    native.import_seat(position, told, control, pool)
        except (OSError, RuntimeError, ValueError) as e:
            problem = str(e)
        why_not = meeting.first_problem(f"mapping of {topic}", problem)
    finally:
        for descriptor in own + held:
            os.close(descriptor)
    if why_not is None:
        native.complete()
    return why_not


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
