"""Signs of life between hosts: who counts as silent, and when."""

import threading
import time

import jax
import pytest

from jax_ep._src.base import jax_compat
from jax_ep._src.processes import leaving
from jax_ep._src.processes.beats import Beats

TIMEOUT = 0.4


class Store:
    """A key-value store in memory. While `is_cut` is set, its calls wait."""

    def __init__(self):
        self.texts = {}
        self.is_reached = threading.Event()
        self.is_reached.set()

    def key_value_set(self, key, text, allow_overwrite=False):
        self.is_reached.wait()
        self.texts[key] = text

    def key_value_dir_get(self, place):
        self.is_reached.wait()
        return [(key, text) for key, text in self.texts.items() if key.startswith(f"{place}/")]

    def blocking_key_value_get(self, key, timeout_in_ms):
        if not self.is_reached.wait(timeout_in_ms / 1000):
            raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED")
        return self.texts[key]


@pytest.fixture
def store(monkeypatch):
    made = Store()
    monkeypatch.setattr(jax_compat, "distributed_client", lambda: made)
    yield made
    made.is_reached.set()


@pytest.fixture
def beats(store):
    made = Beats("group/of some", [0, 3, 7], timeout=TIMEOUT)
    yield made
    store.is_reached.set()
    made.end()


def _watch(beats, seconds, each=lambda: None):
    """Asks as `settle` does, until there is an answer or the time is up."""
    begin = time.monotonic()
    while time.monotonic() - begin < seconds:
        each()
        if (found := beats.silent_process()) is not None:
            return found, time.monotonic() - begin
        time.sleep(0.02)
    return None, seconds


def _others_beat(store, *processes):
    def write():
        for process in processes:
            store.texts[f"jax_ep_beats/group%2Fof%20some/{process}"] = str(time.monotonic())

    return write


def test_nobody_is_silent_who_beats(store, beats):
    assert _watch(beats, 3 * TIMEOUT, _others_beat(store, 3, 7))[0] is None
    assert len(store.texts) == 3  # this process beats, too


def test_a_process_without_a_beat_is_silent_after_the_timeout(store, beats):
    _others_beat(store, 3, 7)()
    found, after = _watch(beats, 10 * TIMEOUT, _others_beat(store, 3))
    assert found == 7
    assert after > TIMEOUT


def test_a_process_is_not_silent_while_nobody_listens(store, beats):
    """Its last beat was heard long ago; the next one comes before the timeout."""
    assert _watch(beats, TIMEOUT, _others_beat(store, 3, 7))[0] is None
    time.sleep(3 * TIMEOUT)
    assert _watch(beats, 3 * TIMEOUT, _others_beat(store, 3, 7))[0] is None


def test_a_process_that_has_closed_its_group_is_not_silent(store, beats):
    _others_beat(store, 3, 7)()
    store.texts["jax_ep_beats/group%2Fof%20some/7"] = "ended"
    assert _watch(beats, 3 * TIMEOUT, _others_beat(store, 3))[0] is None


def test_a_store_that_does_not_answer_is_process_0(store, beats, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 7)
    store.is_reached.clear()
    found, after = _watch(beats, 10 * TIMEOUT)
    assert found == 0
    assert after > 0.5 * TIMEOUT


def test_the_end_tells_the_others_and_waits_for_no_store(store, beats):
    beats.end()
    assert store.texts["jax_ep_beats/group%2Fof%20some/0"] == "ended"
    store.is_reached.clear()
    stuck = Beats("stuck", [0, 3], timeout=TIMEOUT)
    begin = time.monotonic()
    stuck.end()
    assert time.monotonic() - begin < 3.0


def test_an_exit_without_a_store_does_not_wait_for_it(store, monkeypatch):
    """The store's plain calls would wait until JAX aborts the process."""
    called = []
    monkeypatch.setattr(leaving, "_LAST_S", 0.2)
    monkeypatch.setattr(jax_compat, "abandon_runtime", lambda: called.append("abandoned"))

    class Native:
        @staticmethod
        def exit_without_teardown():
            called.append("exits")

    store.is_reached.clear()
    begin = time.monotonic()
    leaving.leave(Native, lambda: True)
    assert time.monotonic() - begin < 3.0
    assert called == ["exits", "abandoned"]
