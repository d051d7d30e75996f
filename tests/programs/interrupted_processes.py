"""Interrupts the processes argv[2] in a wait of the kind argv[1]."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable

import numpy as np
from joined import R, echo, ids, me, mesh, x

import jax_ep
from jax_ep.testing.ranks import on_group

group = jax_ep.Group.open(mesh, "ep", timeout=90.0)
run = on_group(lambda x, ids: echo(group, x, ids), group)
group.check(run(x, ids))
how, who = sys.argv[1:]
waits: dict[str, Callable] = {
    "asarray": lambda y: [np.asarray(s.data) for s in y.addressable_shards],
    "check": group.check,
}
group._native_group.handle.skip_rank(R - 1)
y = run(x, ids)
if str(me) in who:
    threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()
try:
    while True:  # the calls of the rank that stays away do not wait: its process is told later
        waits[how](y)
        group.check(y)
        time.sleep(0.01)
except jax_ep.GroupInterruptedError as e:
    print(e)
    sys.exit(7)
