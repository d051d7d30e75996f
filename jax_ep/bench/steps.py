"""Times of single steps, by the clocks of the devices.

The chain has no loop: reading, operation, reading, operation, and so on. A reading passes on all
operands and all results, so the order needs no pass over them. A step, from one reading to the
next, is one operation and one reading. What a reading takes is known from a chain of readings
alone, and is subtracted. The same chain with a late rank: its readings wait, so it is late at each
operation.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.multihost_utils import process_allgather

import jax_ep
from jax_ep.bench.timing import Carry, no_op, take_turns
from jax_ep.testing.clock import nanoseconds, read_clock
from jax_ep.testing.ranks import on_ranks, place

LATE_RANK = 0
PERCENTILES = (50, 90, 99)
_LINKS = 64  # operations of a chain
_FIRST = 4  # steps that are not counted: ranks begin a chain one after the other
_WARM_UPS = 3  # runs until a command buffer has been captured and is replayed
_FEW, _FEW_RUNS = 8, 2  # steps that are counted in a short chain, and its runs
_FINE_NS, _MAX_SPAN = 100, 16  # a clock of larger ticks is read over several steps
_TICK_DELAY_US, _TICK_REPEATS = 200, 5
Times = np.ndarray[Any, Any]


class Link(NamedTuple):
    """An operation of a contender, and what its chain begins with; arrays [R, ...]."""

    run: Callable[[Any, Any], Any]  # (given, last made) of one rank to made
    carry: Carry


@dataclass(frozen=True)
class Steps:
    """Times of single steps of one contender at one point.

    Of each rank percentiles are taken; the largest of a percentile is that of the slowest rank.

    Attributes:
      count: number of steps of each rank.
      us: percentiles of a step on the slowest rank, less `clock_us`.
      clock_us: median of a reading alone.
      tick_ns: the smallest step of a clock that was seen.
      span: a step is the mean of so many in a row; more than one if the clock is coarse.
      delay_us: by how much rank 0 was late before each operation; None: that was not measured.
      delayed_us: the same percentiles of the other ranks' steps then, the delay included.
    """

    count: int
    us: dict[str, float]
    clock_us: float
    tick_ns: int
    span: int
    delay_us: int | None
    delayed_us: dict[str, float] | None


def make_chain(
    run: Callable[[Any, Any], Any], num_links: int
) -> Callable[[Carry, jax.Array], jax.Array]:
    """Readings around `num_links` operations: (carry, delay_us) to times [num_links + 1, 2]."""

    def chain(carry: Carry, delay_us: jax.Array) -> jax.Array:
        time, carry = _read(delay_us, carry)
        times = [time]
        for _ in range(num_links):
            made = run(*carry)
            time, carry = _read(delay_us, Carry(carry.given, made))
            times.append(time)
        return jnp.stack(times)

    return chain


def _read(delay_us: jax.Array, carry: Carry) -> tuple[jax.Array, Carry]:
    """Reads the clock; an array that is in the carry twice goes through once, without a copy."""
    leaves, structure = jax.tree.flatten(carry)
    distinct = {id(leaf): leaf for leaf in leaves}
    time, _, passed = read_clock(delay_us, distinct)
    return time, jax.tree.unflatten(structure, [passed[id(leaf)] for leaf in leaves])


class _Runs(NamedTuple):
    """Runs of one link, one for each delay; they give [R, steps] in microseconds."""

    is_short: bool
    of: list[Callable[[], Times]]


def measure(
    links: Sequence[Link],
    group: jax_ep.Group,
    *,
    num_steps: int,
    delay_us: int | None = None,
    slow_us: float | None = None,
) -> list[Steps]:
    """Times at least `num_steps` steps of each link, in turns; also with the delay, if it is given.

    One rank alone has no peer that could be late: nothing is delayed then. With `slow_us`, an
    operation that takes longer has a short chain and few runs, after those of the others.
    """
    tick_ns = _measure_tick(group)
    span = int(np.clip(ceil(tick_ns / _FINE_NS), 1, _MAX_SPAN))
    is_late = np.arange(group.num_ranks) == LATE_RANK
    in_time = np.zeros((group.num_ranks, 1), np.int32)
    delays = [in_time]
    if delay_us is not None and group.num_ranks > 1:
        delays.append(np.where(is_late, delay_us, 0).astype(np.int32)[:, None])
    alone = Link(no_op, Carry(place(in_time, group.mesh, group.axes), ()))
    clock = _Runs(is_short=False, of=_make_runs(alone, group, [in_time], span, _LINKS))
    made = [clock, *(_choose_runs(link, group, delays, span, slow_us) for link in links)]
    many = ceil(num_steps / (_LINKS - _FIRST - span + 1))
    taken = {
        is_short: _take([runs for runs in made if runs.is_short == is_short], repeats)
        for is_short, repeats in ((False, many), (True, _FEW_RUNS))
    }
    (readings,), *steps = (next(taken[runs.is_short]) for runs in made)
    clock_us = float(np.median(readings))
    found = []
    for own, *late in steps:
        others = [_percentiles(slow[~is_late] - clock_us) for slow in late]
        found.append(
            Steps(
                count=own.shape[1],
                us=_percentiles(own - clock_us),
                clock_us=clock_us,
                tick_ns=tick_ns,
                span=span,
                delay_us=delay_us if others else None,
                delayed_us=others[0] if others else None,
            )
        )
    return found


def _choose_runs(
    link: Link, group: jax_ep.Group, delays: Sequence[Times], span: int, slow_us: float | None
) -> _Runs:
    """Runs of a long chain, or of a short one if the operation takes longer than `slow_us`."""
    if slow_us is not None:
        short = _make_runs(link, group, delays, span, _FIRST + span - 1 + _FEW, num_warm_ups=1)
        if np.median(short[0]()) > slow_us:  # the same in all processes
            return _Runs(is_short=True, of=short)
    return _Runs(is_short=False, of=_make_runs(link, group, delays, span, _LINKS))


def _make_runs(
    link: Link,
    group: jax_ep.Group,
    delays: Sequence[Times],
    span: int,
    num_links: int,
    *,
    num_warm_ups: int = _WARM_UPS,
) -> list[Callable[[], Times]]:
    """For each of the delays [R, 1] a run of the same program, [R, steps] in microseconds."""
    chain = on_ranks(make_chain(link.run, num_links), group.mesh, axes=group.axes, check_vma=False)
    placed = [place(delay, group.mesh, group.axes) for delay in delays]
    program = chain.lower(link.carry, placed[0]).compile()

    def run(delay_us: jax.Array) -> Times:
        times = process_allgather(program(link.carry, delay_us), tiled=True)
        counted = nanoseconds(times)[:, _FIRST:].astype(np.int64)
        steps: Times = (counted[:, span:] - counted[:, :-span]) / (1e3 * span)
        return steps

    for _ in range(num_warm_ups):
        run(placed[0])
    return [partial(run, delay_us) for delay_us in placed]


def _take(made: Sequence[_Runs], repeats: int) -> Iterator[list[Times]]:
    """For each of them, [R, all steps] of each of its runs; all take turns."""
    runs = [run for own in made for run in own.of]
    taken = take_turns(runs, repeats=repeats) if runs else ()
    # [repeats, R, steps] of each run to [R, all steps].
    joined = iter([np.concatenate(list(own), axis=1) for own in taken])
    return iter([[next(joined) for _ in own.of] for own in made])


def _measure_tick(group: jax_ep.Group) -> int:
    """Nanoseconds of the smallest step that the clocks make during a wait."""
    own = np.full((group.num_ranks, 1), _TICK_DELAY_US, np.int32)
    delay_us, array = place((own, own), group.mesh, group.axes)
    read = on_ranks(lambda *a: read_clock(*a).tick, group.mesh, axes=group.axes, check_vma=False)
    runs = (process_allgather(read(delay_us, array), tiled=True) for _ in range(_TICK_REPEATS))
    return int(min(np.min(ticks) for ticks in runs))


def _percentiles(steps: Times) -> dict[str, float]:
    """Of steps [R, n]; those of the rank for which each is largest."""
    return {f"p{p}": float(np.max(np.percentile(steps, p, axis=1))) for p in PERCENTILES}
