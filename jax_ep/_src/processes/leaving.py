"""The exit of one process of several: with JAX's own shutdown, or without it.

JAX's shutdown waits for all processes, and the end of process 0 aborts the processes that wait in
it. So a process must not enter the shutdown if another one has left without it. A process must not
leave without the shutdown if all others wait in it already. Each process announces in JAX's
key-value store which way it takes.
"""

import atexit
import os
import time
from collections.abc import Callable
from contextlib import suppress
from types import ModuleType

import jax

from jax_ep._src.base import jax_compat, native_modules, registry

# Folders of the store with a key for each process, apart from the keys of openings.
_WAITS = "jax_ep_exits/in_shutdown"
_GONE = "jax_ep_exits/without_shutdown"
# A key that each process sets when it opens its first group, to try the store with.
_PROBE = "jax_ep_exits/probe"
_LAST_S, _POLL_S, _SECOND_LOOK_S = 5.0, 0.05, 0.2


def join_at_exit() -> None:
    """Makes this process join JAX's shutdown only if no other one has left without it."""
    if registry.joins_at_exit != os.getpid():
        registry.joins_at_exit = os.getpid()
        _say(_PROBE)


def leave(native: ModuleType, has_others: Callable[[], bool]) -> None:
    """Makes this process end without JAX's shutdown, unless all others wait in it.

    Process 0 leaves last, or after a while. `has_others` tells whether another process is still
    there, as far as is known.
    """
    if jax_compat.distributed_client() is None:
        return
    if not _is_reachable():
        native.exit_without_teardown()
        jax_compat.abandon_runtime()
        return
    if _all_others_wait():
        return
    _say(_GONE)
    if _all_others_wait():  # the last one came meanwhile; if it has read this key, it leaves, too
        time.sleep(_SECOND_LOOK_S)
        if _all_others_wait():
            return
    if jax.process_index() == 0:
        deadline = time.monotonic() + _LAST_S
        while has_others() and time.monotonic() < deadline:
            time.sleep(_POLL_S)
    native.exit_without_teardown()
    jax_compat.abandon_runtime()


def _join() -> None:
    if registry.joins_at_exit != os.getpid() or jax_compat.distributed_client() is None:
        return
    _say(_WAITS)
    if _said(_GONE):
        leave(
            native_modules.load("cpu"),
            lambda: len(_said(_WAITS) | _said(_GONE)) < jax.process_count(),
        )


def _is_reachable() -> bool:
    """Returns whether the store answers, soon. Its other calls may wait until JAX aborts."""
    try:
        jax_compat.distributed_client().blocking_key_value_get(
            f"{_PROBE}/{jax.process_index()}", int(_LAST_S * 1000)
        )
    except jax.errors.JaxRuntimeError:
        return False
    return True


def _all_others_wait() -> bool:
    others = set(range(jax.process_count())) - {jax.process_index()}
    return others <= _said(_WAITS) - _said(_GONE)


def _say(folder: str) -> None:
    with suppress(jax.errors.JaxRuntimeError):  # the key exists, or process 0 has gone
        jax_compat.distributed_client().key_value_set(f"{folder}/{jax.process_index()}", "")


def _said(folder: str) -> set[int]:
    """Returns the processes with a key in a folder; none if process 0 has gone."""
    try:
        found = jax_compat.distributed_client().key_value_dir_get(folder)
    except jax.errors.JaxRuntimeError:
        return set()
    return {int(key.rpartition("/")[2]) for key, _ in found}


# atexit calls later registrations first: `leave` runs before `_join`, and JAX's shutdown after it.
atexit.register(_join)
