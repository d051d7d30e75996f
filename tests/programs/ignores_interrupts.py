"""Ignores an interrupt of a wait that then times out."""

import signal

from interruptible import ids, interrupt, open_group, x

import jax_ep

signal.signal(signal.SIGINT, signal.SIG_IGN)
group, step = open_group(timeout=3.0)
group._native_group.handle.skip_rank(1)
y = step(x, ids)
interrupt(0.1)
try:
    group.check()
except jax_ep.PeerTimeoutError:
    print("waited")
