"""How all_reduce and its relatives are measured: chains of dependent calls in one jitted program.

A step is the operation and what keeps the chain finite, an elementwise scale; the same chain
without the operation is subtracted.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_ep
from jax_ep import config
from jax_ep.bench.timing import slowest
from jax_ep.testing.ranks import on_ranks, place

STEPS = 100
HIDDEN = 8192
OURS = ("low_latency", "one_shot", "two_shot")
# Pairs of halves are measured as one: a gather, and the scatter of what was gathered.
OPS = ("all_reduce", "halves", "all_reduce_residual_rmsnorm")

Step = Callable[[Any], Any]


@dataclass(frozen=True)
class Measured:
    """Microseconds of one operation on the slowest rank: the chain's share, and the empty one's."""

    algorithm: str
    chain: float
    empty: float

    @property
    def us(self) -> float:
        """Of the operation by itself."""
        return self.chain - self.empty


def algorithms_of(op: str, num_bytes: int, group: jax_ep.Group) -> list[str]:
    """Those that can carry so many bytes from each rank, and psum."""
    ours = OURS if op == "all_reduce" else OURS[:2]
    packets = config.packet_payload(group.num_ranks)
    return [a for a in ours if a != "low_latency" or num_bytes <= packets] + ["psum"]


def measure(
    group: jax_ep.Group,
    op: str,
    num_bytes: int,
    *,
    algorithms: Sequence[str] | None = None,
    dtype: Any = jnp.bfloat16,
    repeats: int = 9,
    steps: int = STEPS,
) -> list[Measured]:
    """All algorithms at one size, in turns; the median of the repeats."""
    names = algorithms_of(op, num_bytes, group) if algorithms is None else list(algorithms)
    make_start, make_step = _PROGRAMS[op]
    start = make_start(group, num_bytes, jnp.dtype(dtype))
    programs = [
        _compile(group, make_step(group, name), start, steps) for name in (*names, "nothing")
    ]
    taken: list[list[float]] = [[] for _ in programs]
    for _ in range(repeats):
        for program, column in zip(programs, taken, strict=True):
            begin = time.perf_counter()
            jax.block_until_ready(program(start))
            column.append((time.perf_counter() - begin) / steps * 1e6)
    medians = [statistics.median(column) for column in slowest(taken)]
    return [Measured(name, us, medians[-1]) for name, us in zip(names, medians, strict=False)]


def _compile(group: jax_ep.Group, step: Step, start: Any, steps: int) -> Callable[[Any], Any]:
    def chain(state: Any) -> Any:
        for _ in range(steps):
            # Or XLA would make one kernel of all scales of the chain without the operation.
            state = jax.lax.optimization_barrier(step(state))
        return state

    mapped: Any = on_ranks(chain, group.mesh, axes=group.axes, check_vma=False)
    program: Callable[[Any], Any] = mapped.lower(start).compile()
    jax.block_until_ready(program(start))
    return program


def _start_vector(group: jax_ep.Group, num_bytes: int, dtype: Any) -> Any:
    shape = (group.num_ranks, max(1, num_bytes // dtype.itemsize))
    return place((np.ones(shape, dtype),), group.mesh, group.axes)[0]


def _reduce_step(group: jax_ep.Group, algorithm: str) -> Step:
    def step(x: Any) -> Any:
        if algorithm == "psum":
            x = jax.lax.psum(x, group.axes)
        elif algorithm != "nothing":
            x = jax_ep.all_reduce(x, group=group, algorithm=algorithm)
        return x * jnp.asarray(1 / group.num_ranks, x.dtype)

    return step


def _halves_step(group: jax_ep.Group, algorithm: str) -> Step:
    def step(x: Any) -> Any:
        if algorithm == "psum":
            x = jax.lax.psum_scatter(jax.lax.all_gather(x, group.axes), group.axes)
        elif algorithm != "nothing":
            call = partial(jax_ep.all_gather, group=group, algorithm=algorithm)
            x = jax_ep.reduce_scatter(call(x), group=group, algorithm=algorithm)
        return x * jnp.asarray(1 / group.num_ranks, x.dtype)

    return step


def _start_rows(group: jax_ep.Group, num_bytes: int, dtype: Any) -> Any:
    rows = max(1, num_bytes // dtype.itemsize // HIDDEN)
    shape = (group.num_ranks, rows, HIDDEN)
    arrays = np.ones(shape, dtype), np.zeros(shape, dtype), np.ones((shape[0], HIDDEN), dtype)
    return place(arrays, group.mesh, group.axes)


def _norm_step(group: jax_ep.Group, algorithm: str) -> Step:
    def step(state: Any) -> Any:
        x, residual, scale = state
        if algorithm == "psum":
            residual = jax.lax.psum(x, group.axes) + residual
            wide = residual.astype(jnp.float32)
            factor = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + 1e-6)
            x = (wide * factor * scale.astype(jnp.float32)).astype(x.dtype)
        elif algorithm != "nothing":
            x, residual = jax_ep.all_reduce_residual_rmsnorm(
                x, residual, scale, group=group, algorithm=algorithm
            )
        return x * jnp.asarray(1 / group.num_ranks, x.dtype), residual, scale

    return step


_PROGRAMS: dict[str, tuple[Callable[..., Any], Callable[..., Step]]] = {
    "all_reduce": (_start_vector, _reduce_step),
    "halves": (_start_vector, _halves_step),
    "all_reduce_residual_rmsnorm": (_start_rows, _norm_step),
}
