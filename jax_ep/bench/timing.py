"""Measurements of chains of dependent operations inside one jitted program.

A chain of dispatches or combines is a scan whose carry holds all operands and all results, so each
result is written in full. Between two operations a zero that the compiler cannot know to be one,
made from the last results, is added to the operands: nothing can be elided, hoisted or run ahead.
The empty chain is the same scan without the operation; its time is subtracted. Chains of the
all_reduce family are in reduce.py.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.multihost_utils import process_allgather

from jax_ep.bench import memory
from jax_ep.bench.contenders import Contender
from jax_ep.testing.ranks import make_mesh, on_ranks, place

OPS = ("dispatch", "cached_dispatch", "combine", "round_trip")
PERCENTILES = (50, 10, 90, 99)
_CHAIN_SECONDS = 0.25
_MIN_COUNT, _MAX_COUNT = 4, 64
# Links in one turn of a loop, of operations that take less time than a turn on a GPU does.
_UNROLL = 16


class Carry(NamedTuple):
    """Operands and results of the last operation; pytrees."""

    given: Any
    made: Any


class Program(NamedTuple):
    """One operation of one contender as a chain link, for one rank."""

    op: str
    start: Callable[..., Carry]  # (x, topk_idx, topk_weights) to the first carry
    run: Callable[[Any, Any], Any]  # (given, last made) to made


@dataclass(frozen=True)
class Timing:
    """Microseconds of one operation on the slowest rank, one value per repeat.

    Attributes:
      chain: the whole chain over its count.
      empty: the chain without the operation over its count.
      count: operations of a chain.
    """

    chain: tuple[float, ...]
    empty: tuple[float, ...]
    count: int

    def percentiles(self) -> dict[str, float]:
        """Percentiles of chain - empty, repeat by repeat."""
        return percentiles(np.subtract(self.chain, self.empty))


def percentiles(values: Any) -> dict[str, float]:
    """As records have them."""
    return {f"p{p}": float(np.percentile(values, p)) for p in PERCENTILES}


def make_program(op: str, contender: Contender) -> Program:
    """The chain link of an operation.

    A link of `round_trip` starts in the middle, combine then dispatch, so that the rows between
    the two are written to memory as experts would need them.
    """
    dispatch, combine, again = contender.dispatch, contender.combine, contender.again

    def start_dispatch(*inputs: jax.Array) -> Carry:
        return Carry(inputs, dispatch(*inputs))

    def start_cached(x: Any, *routing: jax.Array) -> Carry:
        out = dispatch(x, *routing)
        return Carry((x, out.handle), run_cached((x, out.handle), None))

    def run_cached(given: Any, made: Any) -> Any:
        assert again is not None
        return again(*given)

    def start_combine(*inputs: jax.Array) -> Carry:
        out = dispatch(*inputs)
        return Carry(out, combine(out))

    def start_round_trip(x: jax.Array, *routing: jax.Array) -> Carry:
        return Carry(routing, dispatch(x, *routing))

    return {
        "dispatch": Program(op, start_dispatch, lambda given, made: dispatch(*given)),
        "cached_dispatch": Program(op, start_cached, run_cached),
        "combine": Program(op, start_combine, lambda given, made: combine(given)),
        "round_trip": Program(
            op, start_round_trip, lambda given, made: dispatch(combine(made), *given)
        ),
    }[op]


def make_chain(
    op: str, run: Callable[[Any, Any], Any], count: int, *, unroll: int = 1
) -> Callable[[Carry], Carry]:
    """`count` dependent runs of an operation, or of `no_op` in its place."""

    def link(state: tuple[Carry, jax.Array], _: None) -> tuple[tuple[Carry, jax.Array], None]:
        (given, made), zero = state
        given = tie(op, given, zero)
        made = run(given, made)
        return (Carry(given, made), _zero_of(given if run is no_op else made)), None

    def chain(carry: Carry) -> Carry:
        # Scalars go around the loop for the results' sake: XLA 0.12 copies what is read there.
        last: tuple[Carry, jax.Array]
        last, _ = jax.lax.scan(link, (carry, _zero_of(carry)), length=count, unroll=unroll)
        return last[0]

    return chain


def _links_of_turn(mesh: jax.sharding.Mesh, *, is_short: bool) -> int:
    return _UNROLL if is_short and mesh.devices.flat[0].platform == "gpu" else 1


def no_op(given: Any, made: Any) -> Any:
    """In the place of the operation."""
    return made


def tie(op: str, given: Any, zero: jax.Array) -> Any:
    """`given`, but not before `zero` is there; except for the rows of combine, its largest array.

    Those every contender reads through the routing, which is tied. The rows of dispatch are not
    left out: XLA hoists an all_gather of what does not change.
    """
    leaves = jax.tree.leaves(given)
    rows = max(leaves, key=lambda a: a.nbytes) if op == "combine" else None
    return jax.tree.map(lambda a: a if a is rows else a + zero.astype(a.dtype), given)


def _zero_of(tree: Any) -> jax.Array:
    """A zero that is known only when all arrays are there."""
    return sum((_is_odd(a[(0,) * a.ndim]) for a in jax.tree.leaves(tree)), jnp.int32(0))


def _is_odd(value: jax.Array) -> jax.Array:
    """0 for every value that occurs here: no NaN, no smallest integer."""
    if jnp.issubdtype(value.dtype, jnp.floating):
        return jnp.isnan(value).astype(jnp.int32)
    return jnp.equal(value, np.iinfo(value.dtype).min).astype(jnp.int32)


def start(program: Program, mesh: jax.sharding.Mesh, inputs: Sequence[jax.Array]) -> Carry:
    """The first carry. Each run overwrites what it is given, and must not overwrite `inputs`."""
    started: Carry = on_ranks(program.start, mesh, check_vma=False)(*inputs)
    copied: Carry = jax.tree.map(jnp.copy, started)
    return copied


def _compile(
    fn: Callable[[Carry], Any], mesh: jax.sharding.Mesh, carry: Carry, *, donate: bool = True
) -> Any:
    mapped = on_ranks(fn, mesh, check_vma=False, jit=False)
    return jax.jit(mapped, donate_argnums=0 if donate else ()).lower(carry).compile()


class Chain:
    """The compiled chains of one contender, with and without the operation."""

    def __init__(
        self,
        program: Program,
        mesh: jax.sharding.Mesh,
        inputs: Sequence[jax.Array],
        *,
        is_short: bool = False,
    ):
        """`is_short`: whether one operation takes less time than a turn of a loop on a GPU."""
        self._unroll = _links_of_turn(mesh, is_short=is_short)
        self.carry = start(program, mesh, inputs)
        self._program, self._mesh = program, mesh
        self._compiled: dict[tuple[bool, int], Any] = {}

    def compile(self, count: int) -> None:
        """Makes both chains ready and runs them once."""
        for is_empty, run in ((False, self._program.run), (True, no_op)):
            if (is_empty, count) not in self._compiled:
                unroll = min(count, self._unroll)
                chain = make_chain(self._program.op, run, count, unroll=unroll)
                self._compiled[is_empty, count] = _compile(chain, self._mesh, self.carry)
                self.seconds(count, is_empty=is_empty)

    def extra_memory(self) -> int | None:
        """Bytes of one rank, while one operation runs, beyond operands and results."""
        compiled = _compile(
            lambda carry: self._program.run(*carry), self._mesh, self.carry, donate=False
        )
        return memory.extra_bytes(compiled, self.carry, len(self._mesh.local_devices))

    def seconds(self, count: int, *, is_empty: bool) -> float:
        """One run, until the slowest rank is done."""
        seconds, self.carry = run_timed(self._compiled[is_empty, count], self.carry)
        return seconds


def choose_count(chain: Chain) -> int:
    """A count with which a chain takes about a quarter of a second."""
    chain.compile(_MIN_COUNT)
    seconds = slowest(chain.seconds(_MIN_COUNT, is_empty=False) / _MIN_COUNT)
    return int(np.clip(_CHAIN_SECONDS / seconds, _MIN_COUNT, _MAX_COUNT))


def slowest(values: Any) -> Any:
    """Returns the largest value of all processes, number by number, in each of them."""
    own = np.asarray(values)
    return np.max(np.reshape(process_allgather(own), (-1, *own.shape)), axis=0)


def _make_meeting() -> Callable[[], None]:
    """Makes a function that returns when all processes have called it."""
    if jax.process_count() == 1:
        return lambda: None
    mesh = make_mesh(len(jax.devices()))
    zeros = place(np.zeros(mesh.size, np.int32), mesh)
    meet = on_ranks(lambda x: jax.lax.psum(x, mesh.axis_names), mesh, check_vma=False)

    def wait() -> None:
        jax.block_until_ready(meet(zeros))

    return wait


def run_timed(program: Callable[..., Any], *operands: Any) -> tuple[float, Any]:
    """Seconds from the call until this process's ranks are done, and the results."""
    jax.block_until_ready(operands)
    begin = time.perf_counter()
    results = jax.block_until_ready(program(*operands))
    return time.perf_counter() - begin, results


def seconds_of(program: Callable[..., Any], *operands: Any) -> float:
    """The same of a program whose results nobody needs."""
    return run_timed(program, *operands)[0]


def take_turns(
    runs: Sequence[Callable[[], Any]], *, repeats: int, tick: Callable[[], None] = lambda: None
) -> Any:
    """[runs, repeats, ...]: every run once, then all of them again; the slowest process's numbers.

    A run returns a number of seconds, or several. The processes begin each together: who waits for
    a peer that comes late would count that peer's delay.
    """
    taken: list[list[Any]] = [[] for _ in runs]
    meet = _make_meeting()
    for _ in range(repeats):
        for run, column in zip(runs, taken, strict=True):
            meet()
            column.append(run())
        tick()
    return slowest(taken)


def measure(chains: Sequence[Chain], *, repeats: int, tick: Callable[[], None]) -> list[Timing]:
    """Times all chains of a point, interleaved repeat by repeat."""
    counts = [choose_count(chain) for chain in chains]
    for chain, count in zip(chains, counts, strict=True):
        chain.compile(count)
    runs = [
        partial(chain.seconds, count, is_empty=is_empty)
        for chain, count in zip(chains, counts, strict=True)
        for is_empty in (False, True)
    ]
    taken = take_turns(runs, repeats=repeats, tick=tick)
    return [
        make_timing(full, empty, count)
        for full, empty, count in zip(taken[::2], taken[1::2], counts, strict=True)
    ]


def measure_alike(
    programs: Sequence[Program],
    mesh: jax.sharding.Mesh,
    inputs: Sequence[jax.Array],
    *,
    count: int,
    repeats: int,
    tick: Callable[[], None],
    is_short: bool = False,
) -> list[Timing]:
    """Times links of one operation that give the same results from the same operands.

    They share these arrays and the chain without the operation, and their chains have a count that
    is known: two programs are compiled, and one for each of them, where `measure` compiles six.
    """
    carry = start(programs[0], mesh, inputs)
    unroll = _links_of_turn(mesh, is_short=is_short)

    def make_run(link: Callable[[Any, Any], Any]) -> Callable[[], float]:
        chain = make_chain(programs[0].op, link, count, unroll=unroll)
        compiled = _compile(chain, mesh, carry)

        def run() -> float:
            nonlocal carry
            seconds, carry = run_timed(compiled, carry)
            return seconds

        run()
        return run

    runs = [make_run(link) for link in (no_op, *(program.run for program in programs))]
    empty, *full = take_turns(runs, repeats=repeats, tick=tick)
    return [make_timing(own, empty, count) for own in full]


def make_timing(full: Any, empty: Any, count: int) -> Timing:
    """Makes a Timing of the seconds that chains of `count` operations took."""
    chain, without = (tuple(float(s) * 1e6 / count for s in column) for column in (full, empty))
    return Timing(chain, without, count)
