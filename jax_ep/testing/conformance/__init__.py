"""Named checks that every back end must pass. Call each check with a group and a back end.

`CHECKS` takes a minute or two for a back end on a small machine. `FULL` adds many more combinations
of sizes. Every process makes the same arguments and the reference's results on the host, and
compares the shards on its own devices.
"""

from jax_ep.testing.conformance import (
    gradient_bits,
    gradients,
    halves,
    handles,
    layouts,
    low_latency,
    ragged,
    rank_masks,
    reductions,
    round_trips,
    weights,
    wide,
)
from jax_ep.testing.conformance.check import Check as Check

_PARTS = (
    round_trips,
    weights,
    handles,
    gradients,
    gradient_bits,
    layouts,
    wide,
    low_latency,
    halves,
    reductions,
    ragged,
    rank_masks,
)

CHECKS: tuple[Check, ...] = tuple(check for part in _PARTS for check in part.CHECKS)
FULL: tuple[Check, ...] = tuple(check for part in _PARTS for check in part.FULL)
