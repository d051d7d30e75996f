"""Signs of life of the processes of a group over several hosts, in JAX's key-value store.

The end of a process of this host is seen at once. Of another host nothing is seen: if the link to
it is cut, no connection ends, and XLA's collectives wait until JAX aborts the process. So a thread
of each process writes a beat now and then. While results are missing, it also reads the others'.
"""

import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any
from urllib.parse import quote

import jax

from jax_ep._src.base import jax_compat

_PER_TIMEOUT = 8  # beats of a process within the timeout
_ENDED = "ended"
_LAST_S = 1.0  # for the last beat; if the store cannot be reached, nobody waits for it


class Beats:
    """The beats of this process, and what it has heard of the others."""

    def __init__(self, identity: str, processes: Sequence[int], *, timeout: float):
        """Starts the thread. `timeout`: seconds without a beat after which a process is silent."""
        self._place = f"jax_ep_beats/{quote(identity, safe='')}"
        self._processes = processes
        self._timeout = timeout
        self._period = timeout / _PER_TIMEOUT
        self._has_ended = threading.Event()
        self._reached = time.monotonic()  # the last time that the store answered
        self._asked = float("-inf")
        self._heard: dict[int, tuple[str, float, float]] = {}  # last beat, first and last seen
        self._thread = threading.Thread(target=self._beat, name="jax_ep beats", daemon=True)
        self._thread.start()

    def silent_process(self) -> int | None:
        """Returns a process that has given no sign of life for the timeout, or None. Never waits.

        If the store itself does not answer, that is process 0, or else the first other one. A
        process that has closed its group is not silent. Beats are read from the first call on, and
        as long as calls follow one another.
        """
        now = self._asked = time.monotonic()
        me = jax.process_index()
        if now - self._reached > self._timeout + self._period:
            others = [process for process in self._processes if process != me]
            return 0 if 0 in others else others[0]
        for process, (text, first, last) in list(self._heard.items()):
            if process != me and text != _ENDED and last - first > self._timeout:
                return process
        return None

    def end(self) -> None:
        """Ends the thread, and tells the others so."""
        self._has_ended.set()
        self._thread.join(_LAST_S)

    def _beat(self) -> None:
        client = jax_compat.distributed_client()
        own = f"{self._place}/{jax.process_index()}"
        while True:
            with suppress(jax.errors.JaxRuntimeError):
                # The number differs from those of an earlier group of the same name.
                client.key_value_set(own, str(time.time_ns()), allow_overwrite=True)
                if time.monotonic() - self._asked < 2 * self._period:
                    self._listen(client)
                self._reached = time.monotonic()
            if self._has_ended.wait(self._period):
                break
        with suppress(jax.errors.JaxRuntimeError):
            client.key_value_set(own, _ENDED, allow_overwrite=True)

    def _listen(self, client: Any) -> None:
        for key, text in client.key_value_dir_get(self._place):
            process = int(key.rpartition("/")[2])
            now = time.monotonic()
            before, first, _ = self._heard.get(process, ("", now, now))
            self._heard[process] = text, now if text != before else first, now
