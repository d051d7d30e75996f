"""Messages through JAX's key-value store between the processes that open a group.

Each process has one key for a group, and writes all its messages of an opening there. Each process
draws a ticket for an opening, and the tickets of all processes identify the opening. So no message
of another opening, however that one ended, is taken for a message of this one, and no process has
to count openings. Each process writes a digest of all tickets, so the text to read grows only with
the number of processes. The key also holds the previous opening, for processes that have yet to
read how it ended.
"""

import hashlib
import json
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypedDict
from urllib.parse import quote

import jax

from jax_ep._src.base import jax_compat
from jax_ep._src.base.errors import GroupError, JaxEpError, PeerTimeoutError

_FIRST_POLL_S, _LAST_POLL_S = 0.001, 0.05


class _Said(TypedDict):
    """The words of one process in one opening of a group."""

    ticket: str  # drawn for this opening
    name: str  # digest of all tickets that the process has seen; "" after it gave up
    waits: bool  # whether the process waits for others to come
    said: dict[str, Any]  # messages by topic
    failure: dict[str, Any] | None


class KvExchange:
    """The part of one process in one opening."""

    def __init__(self, identity: str, owners: Sequence[int], *, timeout: float):
        """Draws a ticket. `owners`: the process of each device, in the order of the mesh."""
        self._client = jax_compat.distributed_client()
        if self._client is None:
            raise GroupError(
                "Group.open: the mesh spans processes, but jax.distributed was not initialised"
            )
        self._me = jax.process_index()
        self._owners = owners
        self._processes = sorted(set(owners))
        self._timeout = timeout
        self._place = f"jax_ep/{quote(identity, safe='')}"
        ticket = secrets.token_hex(8)
        self._now = _Said(ticket=ticket, name="", waits=True, said={}, failure=None)
        self._before: list[_Said] = []
        self._has_begun = False
        self._is_told = False  # whether another process's failure was raised here

    def gather(self, topic: str, message: Any) -> dict[int, Any]:
        """Returns each process's message about a topic, as JSON. Collective.

        Each topic may be gathered once.

        Raises:
          GroupError: a process did not come to this opening, or has failed in it, and why.
          PeerTimeoutError: a process that had come says nothing within the timeout.
        """
        if not self._has_begun:
            self._begin()
        # Other processes may still read the last topic. All have read the topics before it.
        kept = list(self._now["said"].items())[-1:]
        self._now["said"] = {**dict(kept), topic: message}
        self._write()
        said: dict[int, Any] = {}
        for _ in self._rounds():
            openings = self._openings()
            told = {p: o["said"] for p, o in openings.items() if o is not None}
            said = {p: topics[topic] for p, topics in told.items() if topic in topics}
            if len(said) == len(self._processes):
                return said
            failure = _failure_in(openings)
            if failure is not None:
                self._is_told = True
                raise failure
        raise self._silence(topic, said)

    def heard(self, topic: str) -> dict[int, Any]:
        """Returns the messages about a topic that have come already. Not collective.

        Raises: GroupError, PeerTimeoutError: a process has failed in this opening.
        """
        openings = self._openings()
        failure = _failure_in(openings)
        if failure is not None:
            self._is_told = True
            raise failure
        told = {p: o["said"] for p, o in openings.items() if o is not None}
        return {p: topics[topic] for p, topics in told.items() if topic in topics}

    def end(self, error: BaseException) -> BaseException:
        """Tells the other processes that the opening has failed here. Not collective.

        Returns the exception to raise here: `error`, unless another process's failure caused it.
        """
        if self._is_told:
            return error
        if not self._has_begun:
            if not isinstance(error, Exception):
                return error  # an interrupt or an exit: do not wait
            self._begin()  # the others must know which opening has failed
        timeout = None
        if isinstance(error, PeerTimeoutError):
            # The peer may be missing because a process has failed.
            cause = _failure_in(self._openings())
            if isinstance(cause, GroupError):
                return cause
            timeout = error.to_plain()
        why = str(error).removeprefix("Group.open: ") or type(error).__name__
        self._now["waits"] = False
        self._now["failure"] = {"why": why, "timeout": timeout}
        self._write()
        return error

    def _begin(self) -> None:
        """Waits until all processes have drawn tickets, and each has seen the tickets of all."""
        self._has_begun = True
        others = [p for p in self._processes if p != self._me]
        self._before = self._read().get(self._me, [])[:1]
        have_come: set[int] = set()
        late = others
        for _ in self._rounds():
            # Check first whether all others have, or had, the same digest: a process that has
            # failed since may already have drawn its next ticket.
            found = self._read()
            names = {p: [o["name"] for o in found.get(p, [])] for p in others}
            late = [p for p in others if self._now["name"] not in names[p]]
            if not late and self._now["name"]:
                self._now["waits"] = False
                return
            have_come |= {p for p in others if p in found and found[p][0]["waits"]}
            newest = {p: openings[0]["ticket"] for p, openings in found.items()}
            newest[self._me] = self._now["ticket"]
            name = _name_of([newest.get(p) for p in self._processes])
            if name != self._now["name"]:
                self._now["name"] = name
                self._write()
        # Processes that come later must not join this opening.
        self._now["name"], self._now["waits"] = "", False
        self._write()
        absent = next((p for p in others if p not in have_come), late[0])
        raise GroupError(
            f"Group.open: process {absent} did not open the same group (name, axes, devices) "
            f"within {self._timeout:g} s"
        )

    def _silence(self, topic: str, said: Mapping[int, Any]) -> PeerTimeoutError:
        missing = next(p for p in self._processes if p not in said)
        error = PeerTimeoutError(
            "Group.open",
            rank=self._owners.index(self._me),
            peer=self._owners.index(missing),
            expected=len(self._owners),
            seen=sum(process in said for process in self._owners),
        )
        error.add_note(f"process {missing} said nothing about {topic}")
        return error

    def _openings(self) -> dict[int, _Said | None]:
        """Returns each process's words in this opening; None: it has gone on to another one."""
        found = self._read()
        name = self._now["name"]
        return {
            p: next((o for o in found.get(p, []) if o["name"] == name), None)
            for p in self._processes
        }

    def _rounds(self) -> Iterator[None]:
        """Yields once for each look at the store, with pauses, until the timeout."""
        deadline = time.monotonic() + self._timeout
        # A look reads the text of all processes, so more processes look less often.
        last_pause = _LAST_POLL_S * max(1.0, len(self._processes) / 16)
        pause = _FIRST_POLL_S
        while (remaining := deadline - time.monotonic()) > 0:
            yield
            time.sleep(min(pause, remaining))
            pause = min(2 * pause, last_pause)
        yield

    def _read(self) -> dict[int, list[_Said]]:
        """Returns the words of all processes: in the newest opening, and in the one before."""
        try:
            found = self._client.key_value_dir_get(self._place)
        except jax.errors.JaxRuntimeError as e:
            raise _unreachable(e) from e
        return {int(key.rpartition("/")[2]): json.loads(text) for key, text in found}

    def _write(self) -> None:
        text = json.dumps([self._now, *self._before])
        try:
            self._client.key_value_set(f"{self._place}/{self._me}", text, allow_overwrite=True)
        except jax.errors.JaxRuntimeError as e:
            raise _unreachable(e) from e


def _name_of(tickets: Sequence[str | None]) -> str:
    return hashlib.sha256(json.dumps(tickets).encode()).hexdigest()[:32]


def _unreachable(e: Exception) -> GroupError:
    return GroupError(f"Group.open: JAX's distributed runtime cannot be reached: {e}")


def _failure_in(openings: Mapping[int, _Said | None]) -> JaxEpError | None:
    """Returns another process's failure as the exception to raise here, or None."""
    timeout = None
    for process, opening in openings.items():
        failure = None if opening is None else opening["failure"]
        if failure is not None and failure["timeout"] is None:
            return GroupError(f"Group.open: process {process} failed: {failure['why']}")
        if failure is not None:
            timeout = PeerTimeoutError(**failure["timeout"])
    if timeout is not None:
        return timeout
    for process, opening in openings.items():
        if opening is None:
            return GroupError(f"Group.open: process {process} has given this opening up")
    return None
