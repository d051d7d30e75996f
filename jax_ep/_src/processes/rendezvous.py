"""The rendezvous of the processes of a group, through JAX's distributed runtime.

No XLA collective carries its messages: a group may span only some of the processes, and NCCL
refuses two ranks on one GPU.
"""

import atexit
import ctypes
import os
import secrets
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from types import ModuleType, TracebackType
from typing import Any, Self

import jax

from jax_ep._src.base import jax_compat, native_modules
from jax_ep._src.base.errors import GroupError, PeerTimeoutError
from jax_ep._src.processes import leaving, unix_links
from jax_ep._src.processes.beats import Beats
from jax_ep._src.processes.domains import domain_of
from jax_ep._src.processes.kv_exchange import KvExchange
from jax_ep._src.processes.neighbourhoods import neighbourhoods

# Part of the timeout. A process at a socket must give up before processes give up waiting for it.
_SOCKETS_PART = 0.5


class Rendezvous:
    """The processes of one group, or its one process.

    The group is opened in the body of a `with`. If one process raises there, all processes raise.
    Every method is collective over the processes unless it says otherwise.

    Attributes:
      processes: indices of the processes in JAX.
      is_alone: whether this process is the only one.
      neighbours: processes that share slices with this one, or with its neighbours; links go to
        them.
      crosses_processes: whether a slice of the mesh spans processes; equal in all processes.
      links: links to the neighbours, after `connect`, until another object takes them over.
      why_not_linked: why there are no links, or None.
      domains: the name of each process's domain, after `connect`; "" if it is not known.
      asks_for_others: function of the object that took the links over: whether another process
        is still there.
      timeout: seconds that processes wait for one another.
    """

    def __init__(
        self, identity: str, owners: Sequence[int], slices: Sequence[int], *, timeout: float
    ):
        """`owners`, `slices`: process and slice of each device, in the order of the mesh."""
        me = jax.process_index()
        self.processes = sorted(set(owners))
        self.is_alone = self.processes == [me]
        self._neighbourhoods = neighbourhoods(owners, slices)
        self.neighbours = [
            p for processes in self._neighbourhoods if me in processes for p in processes if p != me
        ]
        self.crosses_processes = any(len(processes) > 1 for processes in self._neighbourhoods)
        self.links: list[unix_links.Link] = []
        self.why_not_linked: str | None = None
        self.domains = dict.fromkeys(self.processes, "")
        self.asks_for_others: Callable[[], bool] | None = None
        self.timeout = timeout
        self._leaves_alone = False
        self._pid = os.getpid()
        self._watched: dict[int, int] = {}  # a descriptor for each process of this host
        self._has_other_hosts = False
        self._identity = identity
        self._beats: Beats | None = None
        self._kv_exchange = None if self.is_alone else KvExchange(identity, owners, timeout=timeout)
        if not self.is_alone:
            leaving.join_at_exit()
            atexit.register(self._end_child)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            return
        raised = error
        if self._kv_exchange is not None:
            with suppress(GroupError):  # the key-value store cannot be reached
                raised = self._kv_exchange.end(error)
        self._leaves_alone = False
        if isinstance(raised, PeerTimeoutError):
            self.leave_alone_at_exit()
        else:
            self.asks_for_others = None
        self.close()
        if raised is not error:
            raise raised from error

    def gather(self, topic: str, message: Any) -> dict[int, Any]:
        """Returns each process's message about a topic, as JSON. Each topic may be gathered once.

        Raises: as KvExchange.gather does.
        """
        if self._kv_exchange is None:
            return {jax.process_index(): message}
        return self._kv_exchange.gather(topic, message)

    def agree(self, topic: str, settings: Mapping[str, Any]) -> None:
        """Raises GroupError in every process if they open the group with different settings."""
        theirs = self.gather(topic, dict(settings))
        for name, own in settings.items():
            values = {process: said[name] for process, said in theirs.items()}
            if any(value != own for value in values.values()):
                listed = ", ".join(f"process {p} has {v!r}" for p, v in values.items())
                raise GroupError(f"Group.open: the processes disagree about {name}: {listed}")

    def first_problem(self, topic: str, problem: str, *, is_echo: bool = False) -> str | None:
        """Returns the first problem of all processes, or None; equal in all processes.

        `is_echo`: whether another process's problem causes this one. Causes precede echoes.
        """
        said = self.gather(topic, [is_echo, problem])
        return _first({p: said[p][1] for p in sorted(said, key=lambda p: said[p][0])})

    def connect(self, *, reads_memory: bool) -> None:
        """Links this process to its neighbours, or sets `why_not_linked` in all processes.

        `reads_memory`: whether each process must be able to read its neighbours' memory.

        This process then watches all processes of its host, neighbours or not.
        """
        if self.is_alone:
            return
        me = jax.process_index()
        token = secrets.token_bytes(unix_links.TOKEN_BYTES)
        mine = {"problem": "", "host": "", "pid": os.getpid(), "address": "", "token": token.hex()}
        listener = None
        with ExitStack() as stack:
            try:
                mine["host"] = unix_links.host()
                if self.crosses_processes:
                    listener, mine["address"] = unix_links.listen(len(self.neighbours) + 1)
                    stack.enter_context(listener)
            except OSError as e:
                mine["problem"] = str(e)
            mine["domain"] = domain_of(str(mine["host"]))
            said = self.gather("address", mine)
            self.domains = {process: told["domain"] for process, told in said.items()}
            self._watch(said)
            if not self.crosses_processes:
                return
            self.why_not_linked = _first({p: told["problem"] for p, told in said.items()})
            if self.why_not_linked is None:
                self.why_not_linked = self._why_apart({p: t["host"] for p, t in said.items()})
            if self.why_not_linked is not None or listener is None:
                return
            problem, is_echo = "", False
            try:
                unix_links.connect(
                    listener,
                    process=me,
                    token=token,
                    others={
                        p: (said[p]["address"], bytes.fromhex(said[p]["token"]))
                        for p in self.neighbours
                    },
                    timeout=self.sockets_timeout,
                    links=self.links,
                    is_in_vain=self._has_failed_link,
                )
            except OSError as e:
                problem = f"no connection between the processes: {e}"
                is_echo = isinstance(e, TimeoutError)
        self.why_not_linked = self.first_problem("links", problem, is_echo=is_echo)
        if self.why_not_linked is None and reads_memory:
            self.why_not_linked = self._first_unreadable()
        if self.why_not_linked is not None:
            self._close_links()

    def _watch(self, said: Mapping[int, Mapping[str, Any]]) -> None:
        me = jax.process_index()
        host = said[me]["host"]
        for process, told in said.items():
            if told["host"] != host:
                self._has_other_hosts = True
            elif process != me and host:
                watch = unix_links.watch_process(told["pid"])
                if watch is not None:
                    self._watched[process] = watch

    def _why_apart(self, hosts: Mapping[int, str]) -> str | None:
        """Returns which slice spans hosts, or None."""
        for processes in self._neighbourhoods:
            theirs = {p: hosts[p] for p in processes}
            if len(set(theirs.values())) > 1:
                return f"a slice of the mesh spans hosts or containers: {theirs}"
        return None

    @property
    def sockets_timeout(self) -> float:
        """Seconds that processes wait for one another at sockets, between two gathers."""
        return _SOCKETS_PART * self.timeout

    def close(self) -> None:
        """Closes the sockets that no other object has taken over. Not collective."""
        atexit.unregister(self._end_child)
        self._end_beats()
        if self._leaves_alone:
            return  # at exit this process asks who is still there
        self._close_links()
        for watch in self._watched.values():
            os.close(watch)
        self._watched = {}

    def _close_links(self) -> None:
        for link in self.links:
            link.socket.close()
        self.links = []

    def hand_over(self) -> None:
        """Gives up the sockets: another object closes them from now on. Not collective."""
        for link in self.links:
            link.socket.detach()
        self.links = []

    def has_others(self) -> bool:
        """Returns whether another process is still there, as far as is known. Not collective.

        A process of another host always counts as there. A neighbour counts until it closes its
        link.
        """
        asks = self.asks_for_others
        if self._has_other_hosts or (
            unix_links.any_is_open(self.links) if asks is None else asks()
        ):
            return True
        strangers = set(self._watched) - set(self.neighbours)
        return any(not unix_links.has_ended(self._watched[process]) for process in strangers)

    def lost_process(self) -> int | None:
        """Returns a process that is known to have ended, or None. Not collective."""
        ended = (p for p, watch in self._watched.items() if unix_links.has_ended(watch))
        return next(ended, None)

    def start_beats(self) -> None:
        """Begins to look for signs of life if some processes are on other hosts. Not collective."""
        if self._has_other_hosts:
            self._beats = Beats(self._identity, self.processes, timeout=self.timeout)
            atexit.register(self._end_beats)

    def _end_beats(self) -> None:
        atexit.unregister(self._end_beats)
        beats, self._beats = self._beats, None
        if beats is not None and os.getpid() == self._pid:
            beats.end()

    def silent_process(self) -> int | None:
        """Returns a process that has given no sign of life for the timeout. Not collective."""
        return None if self._beats is None else self._beats.silent_process()

    def leave_alone_at_exit(self) -> None:
        """Keeps the interpreter's exit from waiting for lost processes. Not collective.

        JAX's own shutdown would wait for lost processes until their heartbeats are missed, and
        then abort this process.
        """
        if not self.is_alone and not self._leaves_alone:
            self._leaves_alone = True
            atexit.register(self._leave, native_modules.load("cpu"))

    def _end_child(self) -> None:
        """Keeps the exit of a forked child from ending the part of its parent in JAX.

        JAX's own shutdown would announce the end to the other processes over the parent's
        connections. It would also wait for threads that the child does not have.
        """
        if os.getpid() == self._pid:
            return
        jax_compat.abandon_runtime()
        with suppress(GroupError):  # a module that cannot be loaded has no teardown
            native_modules.load("cpu").exit_without_teardown()

    def leave_alone_now(self) -> None:
        """Leaves without waiting for lost processes while the interpreter exits already."""
        if not self.is_alone:
            self._leaves_alone = True
            self._leave(native_modules.load("cpu"))

    def _leave(self, native: ModuleType) -> None:
        if self._leaves_alone:
            leaving.leave(native, self.has_others)

    def _has_failed_link(self) -> bool:
        """Returns whether another process has said that a connection failed. Not collective."""
        said = {} if self._kv_exchange is None else self._kv_exchange.heard("links")
        return any(problem for _, problem in said.values())

    def _first_unreadable(self) -> str | None:
        """Reads a random number out of each neighbour's memory; returns the first problem."""
        number = ctypes.c_uint64(secrets.randbits(64))
        problem = ""
        try:
            native = native_modules.load("cpu")
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


def _first(problems: Mapping[int, str]) -> str | None:
    found = [f"process {process}: {problem}" for process, problem in problems.items() if problem]
    return found[0] if found else None


def meet_processes(
    mesh: jax.sharding.Mesh,
    identity: str,
    slices: Sequence[int],
    *,
    timeout: float,
    stacklevel: int,
) -> Rendezvous:
    """Returns the rendezvous of a mesh's processes, which open a group. Waits for no process.

    `slices`: the slice of each device, in the order of the mesh. `stacklevel`: of the warning
    about a long timeout.
    """
    owners = [d.process_index for d in mesh.devices.flat]
    me = jax.process_index()
    if me not in owners:
        raise GroupError(
            f"Group.open: process {me} has no device of the mesh; only processes "
            f"{sorted(set(owners))} open this group"
        )
    rendezvous = Rendezvous(identity, owners, slices, timeout=timeout)
    heartbeat = jax_compat.default_heartbeat_timeout()
    if not rendezvous.is_alone and timeout >= heartbeat:
        warnings.warn(
            f"Group.open: timeout={timeout:g} s: JAX aborts processes that wait for a lost one "
            f"after heartbeat_timeout_seconds ({heartbeat:g} by default; JAX does not tell what "
            "jax.distributed.initialize was given); with a shorter timeout they get an exception",
            stacklevel=stacklevel,
        )
    return rendezvous
