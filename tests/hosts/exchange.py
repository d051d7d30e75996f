"""Dispatches and combines over hosts, compared with the reference. `run.py` starts it.

Every process runs it. argv: seconds of the group's timeout, seconds of JAX's heartbeat timeout,
ranks of a host, and a file. Steps go on until the file says `stop` or something fails. The exit
status is 0 after `stop`, and 3 after an exception, whose kind and text it prints.
"""

import sys
import time
from pathlib import Path

import jax
import numpy as np

import jax_ep
from jax_ep._src.base.config import ProcessPlace
from jax_ep.testing.cases import Case, assert_combined, assert_dispatched, make_data, round_trip
from jax_ep.testing.ranks import make_mesh, on_ranks, place

TIMEOUT, HEARTBEAT, PER_HOST = float(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
ORDERS = Path(sys.argv[4])
_FAILED = 3


def say(*words: object) -> None:
    print(f"[{time.time():.2f}]", *words, flush=True)


def exchange(group: jax_ep.Group) -> None:
    """Steps in two layouts until there is an order to stop."""
    cases = [
        Case(
            group.num_ranks,
            layout,
            num_tokens=16,
            hidden=64,
            weights_at=weights_at,
            ranks_per_node=group.ranks_per_node,
        )
        for layout, weights_at in (("rank", None), ("expert", "rows"))
    ]
    runs = [round_trip(case, group, group.backend) for case in cases]
    # All processes must stop at one step, so one rank's order is everybody's.
    agree = on_ranks(lambda order: jax.lax.pmax(order, "ep"), group.mesh)
    step = 0
    while True:
        begin = time.monotonic()
        for case, run in zip(cases, runs, strict=True):
            data = make_data(case, ("balanced", "skewed", "masked")[step % 3], seed=step)
            out, y = run(*data.operands())
            group.check((out, y))
            assert_combined(case, data, assert_dispatched(case, data, out), y)
        order = np.full(group.num_ranks, ORDERS.read_text().strip() == "stop", np.int32)
        has_stopped = agree(*place([order], group.mesh))
        group.check(has_stopped)
        say(f"step {step} agrees with the reference after {time.monotonic() - begin:.3f} s")
        step += 1
        if np.asarray(has_stopped.addressable_shards[0].data).any():
            return


def main() -> None:
    own = ProcessPlace.from_environment()
    jax.distributed.initialize(
        own.coordinator, own.num_processes, own.process_id, heartbeat_timeout_seconds=HEARTBEAT
    )
    begin = time.monotonic()
    try:
        with jax_ep.Group.open(make_mesh(jax.device_count()), "ep", timeout=TIMEOUT) as group:
            info = group.info()
            say(f"open: {group}, {info.ranks_per_node} ranks a node: {info.ranks_per_node_from}")
            say(f"transport: {info.transport}")
            assert info.ranks_per_node == PER_HOST, info
            exchange(group)
    except Exception as e:
        say(f"raised after {time.monotonic() - begin:.1f} s: {type(e).__name__}: {e}")
        cause = e.__cause__
        if cause is not None:
            say(f"because of {type(cause).__name__}: {str(cause)[:300]}")
        sys.exit(_FAILED)
    say("stopped")


if __name__ == "__main__":
    main()
