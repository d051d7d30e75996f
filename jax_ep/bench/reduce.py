"""Measures the all_reduce family: chains of dependent calls in one jitted program.

A step is the operation, and one elementwise pass that makes the next operands of its results. The
chain without the operation has the passes too; it is subtracted. On GPUs the chain is unrolled: a
turn of a loop takes longer than a small sum. On CPUs it is a loop, since XLA makes one kernel of
unrolled passes there.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jax_ep
from jax_ep._src.base import tables
from jax_ep._src.base.errors import ConfigError
from jax_ep.bench import memory, steps, timing
from jax_ep.bench.shapes import ReducePoint
from jax_ep.testing.cases import DTYPES
from jax_ep.testing.ranks import on_ranks, place

OPS = tables.OPS
OURS = ("low_latency", "one_shot", "two_shot")
PSUM = "psum"  # as an algorithm: the stock collective
HIDDEN = 8192  # of the rows that are normalised
_STEPS, _STEPS_OF_LARGE = 100, 25
_LARGE_BYTES, _LARGE_BYTES_ON_CPU = 4 << 20, 256 << 10

# Operands and results are tuples and arrays of one rank.
Run = Callable[..., Any]


class SumContender(NamedTuple):
    """One way to do it.

    Attributes:
      name: "jax_ep" or the stock collective.
      backend: "cpu", "cuda" or "xla".
      algorithm: of ours; of a stock one "nccl", where XLA is told to use nothing else.
      run: operands to results.
    """

    name: str
    backend: str
    algorithm: str | None
    run: Run


class _Op(NamedTuple):
    """Facts of one operation; n is a rank's x, or its part of a scatter.

    Attributes:
      ours: the public function.
      stock_name: of the collective.
      stock: (*operands, axes) to results of the same shapes.
      start: (n, num_ranks) to the first operands, on the host.
      stand_in: operands to what takes the results' place in the chain without the operation.
      again: (results, operands, 1 / num_ranks) to the next operands, by one pass; finite for ever.
    """

    ours: Run
    stock_name: str
    stock: Run
    start: Callable[[Any, int], tuple[Any, ...]]
    stand_in: Run
    again: Callable[[Any, tuple[Any, ...], jax.Array], tuple[Any, ...]]


def psum_and_norm(
    x: jax.Array, residual: jax.Array, scale: jax.Array, axes: Any
) -> tuple[jax.Array, jax.Array]:
    """all_reduce_residual_rmsnorm as one writes it in stock JAX."""
    residual = jax.lax.psum(x, axes) + residual
    wide = residual.astype(jnp.float32)
    factor = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + 1e-6)
    wide_scale = scale.astype(jnp.float32)[None]
    return (wide * factor * wide_scale).astype(x.dtype), residual


_OPS = {
    "all_reduce": _Op(
        jax_ep.all_reduce,
        "psum",
        jax.lax.psum,
        lambda n, num_ranks: (n,),
        lambda x: x,
        lambda made, operands, share: (made * share,),
    ),
    "reduce_scatter": _Op(
        jax_ep.reduce_scatter,
        "psum_scatter",
        jax.lax.psum_scatter,
        lambda n, num_ranks: (np.broadcast_to(n, (num_ranks, *n.shape)),),
        lambda x: x[0],
        lambda made, operands, share: (jnp.broadcast_to(made * share, operands[0].shape),),
    ),
    "all_gather": _Op(
        jax_ep.all_gather,
        "all_gather",
        jax.lax.all_gather,
        lambda n, num_ranks: (n,),
        lambda x: x[None],
        lambda made, operands, share: (-made[0],),
    ),
    "all_reduce_residual_rmsnorm": _Op(
        jax_ep.all_reduce_residual_rmsnorm,
        "psum",
        psum_and_norm,
        lambda n, num_ranks: (n, np.zeros_like(n), n[0]),
        lambda x, residual, scale: (x, residual),
        lambda made, operands, share: (made[0] * share, made[1], operands[2]),
    ),
}


def contenders(
    point: ReducePoint,
    group: jax_ep.Group,
    backends: Sequence[str],
    algorithms: Sequence[str] | None = None,
) -> list[SumContender]:
    """All that can carry a point's bytes: ours on each back end, then the stock collective.

    Only on the back end `cuda` do our algorithms differ, so one stands for all of them elsewhere,
    unless `algorithms` names them.
    """
    op = _OPS[point.op]
    found = []
    for backend in backends:
        for algorithm in algorithms or (OURS if backend == "cuda" else ("one_shot",)):
            run = partial(op.ours, group=group, algorithm=algorithm, backend=backend)
            if algorithm != PSUM and _takes(run, point, group):
                found.append(SumContender("jax_ep", backend, algorithm, run))
    if algorithms is None or PSUM in algorithms:

        def stock(*operands: jax.Array) -> Any:
            return op.stock(*operands, group.axes)

        found.append(SumContender(op.stock_name, "xla", _stock_algorithm(), stock))
    return found


def _takes(run: Run, point: ReducePoint, group: jax_ep.Group) -> bool:
    """Whether the operation has such an algorithm, and it so much room."""
    try:
        jax.eval_shape(_mapped(_spread(run), group), _on_host(point, group.num_ranks))
    except ConfigError:
        return False
    return True


def _stock_algorithm() -> str | None:
    """Returns "nccl" if a flag makes XLA add small arrays by NCCL, not by its own kernels."""
    flag = "--xla_gpu_experimental_use_collective_kernels="
    given = [f for f in os.environ.get("XLA_FLAGS", "").split() if f.startswith(flag)]
    return "nccl" if given and given[-1] == flag else None


def start(point: ReducePoint, group: jax_ep.Group) -> tuple[jax.Array, ...]:
    """The first operands [R, ...]."""
    placed: tuple[jax.Array, ...] = place(_on_host(point, group.num_ranks), group.mesh, group.axes)
    return placed


def _on_host(point: ReducePoint, num_ranks: int) -> tuple[Any, ...]:
    own = np.ones((point.tokens, point.hidden), DTYPES[point.dtype])
    operands = _OPS[point.op].start(own, num_ranks)
    return tuple(np.broadcast_to(a, (num_ranks, *a.shape)) for a in operands)


def count_steps(point: ReducePoint, *, is_cpu: bool) -> int:
    """Calls of a chain."""
    large = _LARGE_BYTES_ON_CPU if is_cpu else _LARGE_BYTES
    return _STEPS if point.num_bytes < large else _STEPS_OF_LARGE


def make_chain(
    op: str, run: Run | None, steps: int, num_ranks: int, *, unroll: bool
) -> Callable[[Any], Any]:
    """`steps` dependent calls, or passes alone; operands to operands of one rank."""
    stand_in, again = _OPS[op].stand_in, _OPS[op].again

    def step(operands: tuple[Any, ...], _: None) -> tuple[tuple[Any, ...], None]:
        share = jnp.asarray(1 / num_ranks, operands[0].dtype)
        # Results are made in whole, also what no pass reads, and not by the pass's kernel.
        made = (
            jax.lax.optimization_barrier(run(*operands)) if run is not None else stand_in(*operands)
        )
        # Or the unrolled passes of the chain without the operation would be one kernel.
        return jax.lax.optimization_barrier(again(made, operands, share)), None

    def chain(operands: tuple[Any, ...]) -> Any:
        return jax.lax.scan(step, operands, length=steps, unroll=steps if unroll else 1)[0]

    return chain


def measure(
    point: ReducePoint,
    group: jax_ep.Group,
    entrants: Sequence[SumContender],
    *,
    repeats: int,
    tick: Callable[[], None] = lambda: None,
) -> list[timing.Timing]:
    """Times all contenders of a point, turn by turn, with one chain without the operation."""
    is_cpu = group.mesh.devices.flat[0].platform == "cpu"
    steps, operands = count_steps(point, is_cpu=is_cpu), start(point, group)
    runs = []
    for run in (*(entrant.run for entrant in entrants), None):
        chain = make_chain(point.op, run, steps, group.num_ranks, unroll=not is_cpu)
        program = _mapped(chain, group).lower(operands).compile()
        jax.block_until_ready(program(operands))
        runs.append(partial(timing.seconds_of, program, operands))
    *taken, empty = timing.take_turns(runs, repeats=repeats, tick=tick)
    return [timing.make_timing(full, empty, steps) for full in taken]


def links(
    point: ReducePoint, group: jax_ep.Group, entrants: Sequence[SumContender]
) -> list[steps.Link]:
    """Links whose single steps are timed: every call has the first operands."""
    carry = timing.Carry(start(point, group), ())
    runs = [_spread(entrant.run) for entrant in entrants]
    return [steps.Link(partial(_ignore_made, run), carry) for run in runs]


def _ignore_made(run: Run, given: Any, made: Any) -> Any:
    return run(given)


def extra_memory(
    point: ReducePoint, group: jax_ep.Group, entrants: Sequence[SumContender]
) -> Iterator[int | None]:
    """Bytes of one rank, while one operation of each runs, beyond operands and results."""
    operands = start(point, group)
    for entrant in entrants:
        compiled = _mapped(_spread(entrant.run), group).lower(operands).compile()
        yield memory.extra_bytes(compiled, operands, len(group.mesh.local_devices))


def _spread(run: Run) -> Callable[[Any], Any]:
    return lambda operands: run(*operands)


def _mapped(fn: Callable[[Any], Any], group: jax_ep.Group) -> Any:
    return on_ranks(fn, group.mesh, axes=group.axes, check_vma=False)
