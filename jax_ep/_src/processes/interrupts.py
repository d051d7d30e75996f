"""Ctrl-C while the main thread waits in C++ for calls of a group (xla_ffi/runtime/interrupt.h)."""

import signal
import time

import jax

from jax_ep._src.base import jax_compat, native_modules, registry

_END_S, _POLL_S = 2.0, 0.01


def watch() -> None:
    """Makes Ctrl-C end calls that wait for their peers. Any thread may call it, again and again.

    A program that has its own SIGINT handler keeps it: the function acts only if Ctrl-C raises
    KeyboardInterrupt. A later `signal.signal` replaces the handler that this function installs,
    until `watch` is called again.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        native_modules.load("cpu").watch_interrupts()
        if registry.interrupts_survived is None:
            registry.interrupts_survived = 0


def survive() -> None:
    """Notes that the program has survived all interrupts so far."""
    if registry.interrupts_survived is not None:
        registry.interrupts_survived = native_modules.load("cpu").num_interrupts()


def end_program() -> None:
    """Ends all waits when the interpreter exits because of an interrupt.

    Calls that wait for peers end, and so do calls that begin to wait. If programs are in flight,
    JAX's clients are not destroyed: they would wait for the programs, and they have crashed when
    a program ended meanwhile.
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
