"""Parts of the programs that get an interrupt: a group of three ranks, and a step."""

import os
import signal
import sys
import threading
from pathlib import Path

import numpy as np

import jax_ep
from jax_ep.testing import virtual_devices
from jax_ep.testing.ranks import make_mesh, on_ranks

sys.path.append(str(Path(__file__).parents[1]))  # the folder of the tests' own modules
from steps import make_echo

virtual_devices()
x, ids = np.ones((3, 4, 8), np.float32), np.zeros((3, 4, 1), np.int32)
mesh = make_mesh(3)


def interrupt(delay):
    threading.Timer(delay, os.kill, (os.getpid(), signal.SIGINT)).start()


def open_group(timeout=600.0):
    """Returns a group, and a compiled step that has run once."""
    group = jax_ep.Group.open(mesh, "ep", timeout=timeout)
    step = on_ranks(make_echo(group), mesh)
    group.check(step(x, ids))
    return group, step
