"""What every back end must do, as named checks: call each with a group and a back end.

`CHECKS` takes a minute or two for a back end on a small machine; `FULL` holds it and many more
combinations of sizes. Arguments and the reference are made on the host, alike in every process, and
each process compares the shards that it has.
"""

from jax_ep.testing.conformance import (
    gradient_bits,
    gradients,
    handles,
    layouts,
    reductions,
    round_trips,
    weights,
    wide,
)
from jax_ep.testing.conformance.check import Check as Check

_PARTS = (round_trips, weights, handles, gradients, gradient_bits, layouts, wide, reductions)

CHECKS: tuple[Check, ...] = tuple(check for part in _PARTS for check in part.CHECKS)
FULL: tuple[Check, ...] = tuple(check for part in _PARTS for check in part.FULL)
