"""Ctrl-C while the main thread waits in C++ for calls of a group (xla_ffi/runtime/interrupt.h)."""

import signal
import time

import jax

from jax_ep import _jax_compat, _native, _registry

_END_S, _POLL_S = 2.0, 0.01


def watch() -> None:
    """From now on Ctrl-C ends calls that wait for their peers. Any thread; cheap when repeated.

    Only where Ctrl-C raises KeyboardInterrupt: a handler of the program's own may want something
    else. `signal.signal` takes the place of what this installs, until it is called again.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        _native.load("cpu").watch_interrupts()
        if _registry.interrupts_survived is None:
            _registry.interrupts_survived = 0


def survive() -> None:
    """The program goes on after all interrupts so far: they do not end it."""
    if _registry.interrupts_survived is not None:
        _registry.interrupts_survived = _native.load("cpu").num_interrupts()


def end_program() -> None:
    """At the exit of the interpreter: if an interrupt ends the program, nothing is waited for.

    Calls that wait end, and those that begin to. Where something has been in flight, JAX's clients
    are not destroyed: they would wait for it, and have been seen to crash when it ends meanwhile.
    """
    if _registry.interrupts_survived is None:
        return
    native = _native.load("cpu")
    if native.num_interrupts() == _registry.interrupts_survived:
        return
    is_idle = not native.any_waits() and all(map(_jax_compat.is_ready, jax.live_arrays()))
    native.leave_by_interrupt()
    deadline = time.monotonic() + _END_S
    while native.any_waits() and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    for group in list(_registry.open_groups.values()):
        group.leave_alone_now()
    if not is_idle:
        native.exit_without_teardown()
        _jax_compat.abandon_runtime()
