"""Takes turns at a benchmark with a process that comes late."""

import time

import jax

from jax_ep.bench.timing import take_turns
from jax_ep.testing import launch

launch.initialize()
begun: list[float] = []


def run():
    begun.append(time.monotonic())
    return 1.0 + jax.process_index()


taken = take_turns([run], repeats=3, tick=lambda: time.sleep(2 * jax.process_index()))
assert taken.tolist() == [[2.0] * 3], taken
assert begun[2] - begun[1] > 1, begun  # process 0 too, which does not sleep
print("passed")
