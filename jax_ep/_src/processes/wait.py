"""Waits for results that may never come, or that are deleted during the wait."""

import time
import weakref
from collections.abc import Callable, Collection, Iterator
from typing import Any

import jax

from jax_ep._src.base import jax_compat, registry
from jax_ep._src.base.errors import JaxEpError

_LOOK_S = 0.05
# Time for a program to end after its group has failed, and for a failure to become known.
GRACE_S = 0.5
# Pause between two looks at results: a part of the time waited so far, within limits.
_PART, _MIN_PAUSE_S, _MAX_PAUSE_S = 0.02, 20e-6, 2e-3


def arrays_in(results: Any) -> list[jax.Array]:
    """Returns the arrays of a pytree; for a key array, the array that holds its bits."""
    leaves = [leaf for leaf in jax.tree.leaves(results) if isinstance(leaf, jax.Array)]
    return [leaf for leaf in map(jax_compat.plain_array, leaves) if leaf is not None]


def live_arrays(devices: Collection[jax.Device]) -> list[jax.Array]:
    """Returns live arrays on some of the devices, without arrays whose failure was told already.

    Another thread may delete or donate any array at any time.
    """
    told = [array for ref in registry.told_failures if (array := ref()) is not None]
    known = {id(array) for array in told}
    wanted = set(devices)
    return [
        array
        for array in jax.live_arrays()
        # array.devices() would raise for an array that has been deleted.
        if id(array) not in known and wanted & array.sharding.device_set
    ]


def wait(arrays: Collection[jax.Array]) -> list[Exception]:
    """Waits for all arrays; returns the exceptions that JAX raises for them.

    Deleted and donated arrays are skipped. A returned failure counts as told from now on.
    """
    try:
        jax.block_until_ready(list(arrays))
        return []
    except Exception as e:
        of_all = e
    problems = []
    for array in arrays:
        try:
            jax.block_until_ready(array)
        except Exception as e:
            if not jax_compat.is_gone(array, e):
                problems.append(e)
                _mark_as_told(array)
    if not problems and not any(jax_compat.is_gone(array, of_all) for array in arrays):
        problems.append(of_all)
    return problems


def settle(
    arrays: Collection[jax.Array],
    *,
    failure: Callable[[], JaxEpError | None],
    loss: Callable[[], JaxEpError | None],
    silence: Callable[[], JaxEpError | None] = lambda: None,
    timeout: float,
) -> list[Exception]:
    """Waits like `wait` in a program of several processes, but not for results that cannot come.

    A custom call ends when its group fails. A later psum whose peer has gone may never end, or
    fails with its own message.

    Args:
      arrays: arrays to wait for.
      failure: returns the failure that the group has recorded, or None.
      loss: returns an error for a process of the group that has ended, or None. A process may end
        when its work is done, while this process still computes. So the loss is blamed only for
        results that have failed, or are late.
      silence: returns an error for a process that has been silent for the timeout, or None.
      timeout: seconds from a loss until results are late.

    Raises: the exception that `failure`, `loss` or `silence` returns.
    """
    begin = looked = time.monotonic()
    since: dict[str, float] = {}
    # block_until_ready cannot be interrupted. A thread that is still in it when the interpreter
    # ends would abort the process.
    while not all(jax_compat.is_ready(array) for array in arrays):
        now = time.monotonic()
        time.sleep(min(max(_PART * (now - begin), _MIN_PAUSE_S), _MAX_PAUSE_S))
        if now - looked < _LOOK_S:
            continue
        looked = now
        for kind, found, patience in (
            ("failure", failure(), GRACE_S),
            ("loss", loss(), timeout),
            ("silence", silence(), GRACE_S),
        ):
            if found is not None and now - since.setdefault(kind, now) > patience:
                raise found
    problems = wait(arrays)
    if problems:
        deadline = time.monotonic() + GRACE_S
        while (known := failure() or loss()) is None and time.monotonic() < deadline:
            time.sleep(_LOOK_S)
        if known is not None:
            raise known from cause_of(problems)
    return problems


def cause_of(problems: Collection[Exception]) -> Exception:
    """Returns one exception for all problems. Ranks that fail alike raise equal exceptions."""
    different = list({(type(p), str(p)): p for p in problems}.values())
    if len(different) == 1:
        return different[0]
    return ExceptionGroup("several programs or ranks failed", different)


def excuse_failures(error: BaseException, devices: Collection[jax.Device]) -> None:
    """Counts the failures behind JAX's exception as told when the exception leaves a `with` block.

    JAX keeps a failure in every result, and in the tokens of the thread's last effects. It raises
    the failure at every look at one of them. The function waits for nothing: programs that still
    run are excused, too.
    """
    if not any(isinstance(e, jax.errors.JaxRuntimeError) for e in _chain(error)):
        return
    jax_compat.excuse_effects()
    for array in live_arrays(devices):
        if not jax_compat.is_ready(array):
            _mark_as_told(array)
        else:
            wait([array])


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yields an exception, its causes, its contexts, and the members of groups."""
    seen: list[BaseException] = []
    waiting = [error]
    while waiting:
        found = waiting.pop()
        if found is None or any(found is e for e in seen):
            continue
        seen.append(found)
        yield found
        waiting += [found.__cause__, found.__context__]
        if isinstance(found, BaseExceptionGroup):
            waiting += found.exceptions


def _mark_as_told(array: jax.Array) -> None:
    told = [ref for ref in registry.told_failures if ref() is not None]
    registry.told_failures[:] = [*told, weakref.ref(array)]
