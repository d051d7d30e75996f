"""Ctrl-C while the main thread waits in C++ for calls of a group (xla_ffi/runtime/interrupt.h)."""

import signal
import time

import jax

from jax_ep._src.base import jax_compat, native_modules, registry

_END_S, _POLL_S = 2.0, 0.01


def watch() -> None:
    """From now on Ctrl-C ends calls that wait for their peers. Any thread; cheap when repeated.

    Only where Ctrl-C raises KeyboardInterrupt: a handler of the program's own may want something
    else. `signal.signal` takes the place of what this installs, until it is called again.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        native_modules.load("cpu").watch_interrupts()
        if registry.interrupts_survived is None:
            registry.interrupts_survived = 0


def survive() -> None:
    """The program goes on after all interrupts so far: they do not end it."""
    if registry.interrupts_survived is not None:
        registry.interrupts_survived = native_modules.load("cpu").num_interrupts()


def end_program() -> None:
    """At the exit of the interpreter: if an interrupt ends the program, nothing is waited for.

    Calls that wait end, and those that begin to. Where something has been in flight, JAX's clients
    are not destroyed: they would wait for it, and have been seen to crash when it ends meanwhile.
    """
    if registry.interrupts_survived is None:
        return
    native = native_modules.load("cpu")
    if native.num_interrupts() == registry.interrupts_survived:
        return
    is_idle = not native.any_waits() and all(map(jax_compat.is_ready, jax.live_arrays()))
    native.leave_by_interrupt()
    deadline = time.monotonic() + _END_S
    while native.any_waits() and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    for group in list(registry.open_groups.values()):
        group.leave_alone_now()
    if not is_idle:
        native.exit_without_teardown()
        jax_compat.abandon_runtime()
