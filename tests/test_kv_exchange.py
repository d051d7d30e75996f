"""Messages of processes that open a group. Threads play the processes, and a dict the store."""

import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jax_ep._src.base import jax_compat
from jax_ep._src.base.errors import GroupError, PeerTimeoutError
from jax_ep._src.processes import kv_exchange
from jax_ep._src.processes.rendezvous import meet_processes

pytestmark = pytest.mark.dealt


class Store:
    """Stands for JAX's key-value store."""

    def __init__(self):
        self.values = {}

    def key_value_dir_get(self, folder):
        found = list(self.values.items())  # a copy, because other threads add to the dict
        return [(key, text) for key, text in found if key.startswith(f"{folder}/")]

    def key_value_set(self, key, text, *, allow_overwrite=False):
        if key in self.values and not allow_overwrite:
            raise jax.errors.JaxRuntimeError(f"{key} exists")
        self.values[key] = text


@pytest.fixture
def converse(monkeypatch):
    """converse(process, timeout): returns a process's part in a new opening by the owners."""
    store = Store()
    monkeypatch.setattr(kv_exchange.jax_compat, "distributed_client", lambda: store)

    def make(process, timeout=20.0, owners=(0, 0, 1, 1, 2, 2)):
        monkeypatch.setattr(jax, "process_index", lambda: process)
        return kv_exchange.KvExchange("a//b", owners, timeout=timeout)

    make.store = store  # type: ignore[attr-defined]
    return make


def _at_once(*calls):
    """Runs the calls in threads; returns their results or exceptions."""
    with ThreadPoolExecutor(len(calls)) as pool:
        futures = [pool.submit(*call) for call in calls]
        return [future.exception() or future.result() for future in futures]


def test_messages_of_another_opening_are_not_heard(converse):
    first = [converse(p) for p in range(3)]
    assert _at_once(*[(c.gather, "x", i) for i, c in enumerate(first)]) == [{0: 0, 1: 1, 2: 2}] * 3
    early = [converse(p, timeout=0.2) for p in range(2)]
    for error in _at_once(*[(c.gather, "x", "early") for c in early]):
        assert isinstance(error, GroupError)
        assert "process 2 did not open the same group" in str(error)
    second = [converse(p) for p in range(3)]
    said = {p: f"second {p}" for p in range(3)}
    assert _at_once(*[(c.gather, "x", said[p]) for p, c in enumerate(second)]) == [said] * 3
    assert len(converse.store.values) == 3


def test_the_text_of_a_process_does_not_grow_with_their_number(converse):
    parts = [converse(p, owners=range(100)) for p in range(100)]
    said = dict.fromkeys(range(100), 0)
    assert _at_once(*[(c.gather, "x", 0) for c in parts]) == [said] * 100
    assert max(map(len, converse.store.values.values())) < 300


def test_messages_are_heard_without_waiting_for_all(converse):
    parts = [converse(p) for p in range(3)]
    _at_once(*[(c.gather, "x", p) for p, c in enumerate(parts)])
    assert parts[0].heard("y") == {}
    for p in (1, 2):
        parts[p]._now["said"]["y"] = f"{p} is there"
        parts[p]._write()
    assert parts[0].heard("y") == {1: "1 is there", 2: "2 is there"}
    parts[2].end(MemoryError("no room"))
    with pytest.raises(GroupError, match=r"^Group\.open: process 2 failed: no room$") as caught:
        parts[0].heard("y")
    assert parts[0].end(caught.value) is caught.value


def test_the_end_of_an_opening_is_heard_from_within_the_next(converse):
    first = [converse(p) for p in range(3)]
    _at_once(*[(c.gather, "x", 0) for c in first])
    assert first[1].end(MemoryError("no room")).args == ("no room",)
    again = converse(1, timeout=0.2)
    with pytest.raises(GroupError, match="did not open"):
        again.gather("x", 0)
    for c in (first[0], first[2]):
        with pytest.raises(GroupError, match=r"^Group\.open: process 1 failed: no room$") as caught:
            c.gather("y", 0)
        assert c.end(caught.value) is caught.value
    # The end of a successful opening is heard, too.
    second = [converse(p) for p in range(3)]
    _at_once(*[(c.gather, "x", 0) for c in second])
    slow, *fast = [(c.gather, "y", p) for p, c in enumerate(second)]
    with ThreadPoolExecutor(2) as pool:
        ahead = [pool.submit(*call) for call in fast]
        second[0]._now["said"]["y"] = 0
        second[0]._write()
        assert [future.result() for future in ahead] == [{0: 0, 1: 1, 2: 2}] * 2
    with pytest.raises(GroupError):
        converse(1, timeout=0.1).gather("x", "next")
    assert slow[0](*slow[1:]) == {0: 0, 1: 1, 2: 2}


def test_a_failure_before_the_first_message_is_heard(converse):
    parts = [converse(p) for p in range(3)]
    error = MemoryError("Group.open: no room")
    calls = [(parts[0].gather, "x", 0), (parts[1].end, error), (parts[2].gather, "x", 2)]
    first, own, last = _at_once(*calls)
    assert own is error
    assert str(first) == str(last) == "Group.open: process 1 failed: no room"
    interrupt = KeyboardInterrupt()
    assert converse(1).end(interrupt) is interrupt  # end() waits for nobody


def test_a_failure_is_heard_although_the_next_opening_has_begun(converse):
    """Processes that look again only now still take part in the opening that has failed."""
    for _ in range(5):
        parts = [converse(p) for p in range(3)]

        def fails_and_begins_again(part, again):
            time.sleep(0.15)  # by then the others look less often
            part.end(MemoryError("no room"))
            again.gather("x", 1)

        again = converse(1, timeout=0.3)
        waits = [(parts[p].gather, "x", p) for p in (0, 2)]
        first, last, late = _at_once(*waits, (fails_and_begins_again, parts[1], again))
        assert str(first) == str(last) == "Group.open: process 1 failed: no room"
        assert "did not open the same group" in str(late)


def test_a_process_that_falls_silent_is_named_as_missing(converse):
    parts = [converse(p, timeout=0.5 if p == 0 else 20.0) for p in range(3)]
    _at_once(*[(c.gather, "x", 0) for c in parts])

    def falls_out(part):
        try:
            part.gather("y", 0)
        except PeerTimeoutError as e:
            return part.end(e)

    for error in _at_once((falls_out, parts[0]), (falls_out, parts[2])):
        assert (error.op, error.rank, error.peer) == ("Group.open", 0, 2)
        assert (error.expected, error.seen, error.is_lost) == (6, 4, False)


def test_the_failure_of_a_missing_peer_is_raised(converse):
    parts = [converse(p) for p in range(3)]
    _at_once(*[(c.gather, "x", 0) for c in parts])
    parts[2].end(MemoryError("no room"))
    raised = parts[0].end(PeerTimeoutError("pull_rows", 0, 4, 6, 4))
    assert isinstance(raised, GroupError)
    assert str(raised) == "Group.open: process 2 failed: no room"


@pytest.mark.parametrize("default", [100, 50])
def test_a_timeout_beyond_the_heartbeat_of_jax_warns(converse, monkeypatch, default):
    """The warning names JAX's default: nobody can ask JAX for the timeout that it was given."""
    assert jax_compat.default_heartbeat_timeout() == 100.0  # the default of all versions so far

    def initialize(self, address=None, heartbeat_timeout_seconds=default):
        pass

    monkeypatch.setattr(jax_compat.distributed.State, "initialize", initialize)
    monkeypatch.setattr(jax, "process_index", lambda: 0)
    mesh = SimpleNamespace(devices=np.array([SimpleNamespace(process_index=p) for p in (0, 1)]))
    meet_processes(mesh, "x", [0, 0], timeout=default - 1.0, stacklevel=1).close()
    with pytest.warns(UserWarning, match=rf"heartbeat_timeout_seconds \({default} by default"):
        meet_processes(mesh, "x", [0, 0], timeout=float(default), stacklevel=1).close()
    alone = SimpleNamespace(devices=mesh.devices[:1])
    meet_processes(alone, "x", [0], timeout=float(default), stacklevel=1).close()
