"""State that all points of a command share; makes table rows and records of a point."""

import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.experimental.multihost_utils import process_allgather

import jax_ep
from jax_ep._src.base.tables import EXCHANGES
from jax_ep.bench import floor, plots, reduce, report, steps, timing
from jax_ep.bench.contenders import Contender, contenders, ours, sms_of
from jax_ep.bench.record import (
    Measured,
    Place,
    Record,
    Subject,
    append_lines,
    make_record,
    result_path,
)
from jax_ep.bench.shapes import Point, ReducePoint, make_inputs
from jax_ep.testing.ranks import on_ranks

_SHORT = 1024  # tokens of a rank whose exchange takes less time than a turn of a loop
_OURS_COUNT = 48  # operations of a chain of our contenders
_BUDGET_COUNT = 32  # operations of a chain that tells budgets apart


class Session:
    """A group, and who is measured on it."""

    def __init__(
        self,
        group: jax_ep.Group,
        place: Place,
        *,
        repeats: int,
        copy_rate: float | None = None,
        backends: Sequence[str] | None = None,
        budgets: Sequence[int] | None = None,
        algorithms: Sequence[str] | None = None,
        only_ours: bool = False,
        num_steps: int = 0,
        delay_us: int | None = None,
    ):
        """`copy_rate` is the memory's, on CPUs.

        Single steps, `num_steps` of sums and exchanges of few tokens, are timed as well, and
        with `delay_us` as many while one rank is late.

        None for the back ends: those that are usable; for the SM budgets: the group's of each
        operation and layout; for the algorithms of the all_reduce family: all that can carry
        a size.
        """
        usable = [b for b, reason in group.info().backends.items() if reason == "usable"]
        self._backends = backends or usable
        self._entries: list[tuple[str, int | None]] = []
        for backend in self._backends:
            told = budgets if budgets and backend == "cuda" else [None]
            self._entries += [(backend, sms) for sms in told]
        self._algorithms = algorithms
        self._group, self._place, self._copy_rate = group, place, copy_rate
        self._repeats = repeats
        self._only_ours = only_ours
        self._num_steps, self._delay_us = num_steps, delay_us

    def measure(self, op: str, point: Point | ReducePoint, progress: Any) -> list[report.Row]:
        """All contenders of one operation at one point, interleaved, under one run id."""
        if isinstance(point, ReducePoint):
            return self._measure_reduce(point, progress)
        progress.set_description(f"{op} {point.shape} {point.num_tokens} {point.layout}")
        mesh = self._group.mesh
        inputs = make_inputs(point, mesh, ranks_per_node=self._group.ranks_per_node)
        if self._only_ours:
            return self._measure_ours(op, point, inputs, progress)
        everyone = contenders(point, self._group, self._entries)
        entrants = [e for e in everyone if op != "cached_dispatch" or e.again is not None]
        programs = [timing.make_program(op, entrant) for entrant in entrants]
        is_short = point.num_tokens <= _SHORT
        chains = [timing.Chain(program, mesh, inputs, is_short=is_short) for program in programs]
        extra = [chain.extra_memory() for chain in chains]
        taken = timing.measure(chains, repeats=self._repeats, tick=progress.update)
        links = [steps.Link(p.run, c.carry) for p, c in zip(programs, chains, strict=True)]
        single = self._measure_steps(links) if is_short else None
        recv_src = _route(point, self._group, self._entries[0][0], inputs)
        moved = floor.traffic(op, point, recv_src)
        subjects = [_subject(op, point, entrant, self._group) for entrant in entrants]
        return self._rows(subjects, taken, moved, extra, single)

    def _measure_ours(self, op: str, point: Point, inputs: Any, progress: Any) -> list[report.Row]:
        """Our contenders, which share operands and the empty chain; without the extra memory."""
        entrants = [
            e
            for e in contenders(point, self._group, self._entries)
            if e.name == "jax_ep" and (op != "cached_dispatch" or e.again is not None)
        ]
        programs = [timing.make_program(op, entrant) for entrant in entrants]
        is_short = point.num_tokens <= _SHORT
        taken = timing.measure_alike(
            programs,
            self._group.mesh,
            inputs,
            count=_OURS_COUNT,
            repeats=self._repeats,
            tick=progress.update,
            is_short=is_short,
        )
        single = None
        if is_short and self._num_steps:
            carry = timing.start(programs[0], self._group.mesh, inputs)
            single = self._measure_steps([steps.Link(p.run, carry) for p in programs])
        moved = floor.traffic(op, point, _route(point, self._group, self._entries[0][0], inputs))
        subjects = [_subject(op, point, entrant, self._group) for entrant in entrants]
        return self._rows(subjects, taken, moved, [None] * len(entrants), single)

    def measure_budgets(
        self, point: Point, budgets: Sequence[int], progress: Any
    ) -> list[report.Row]:
        """Each operation with each budget, and on the back end `xla`; without the extra memory."""
        group, mesh = self._group, self._group.mesh
        entrants = [ours(point, group, b, sms) for b in self._backends for sms in budgets]
        entrants.append(ours(point, group, "xla", None))
        inputs = make_inputs(point, mesh, ranks_per_node=self._group.ranks_per_node)
        recv_src = _route(point, group, self._backends[0], inputs)
        rows = []
        for op in EXCHANGES:
            progress.set_description(f"{op} {point.shape} {point.num_tokens} {point.layout}")
            taken = timing.measure_alike(
                [timing.make_program(op, entrant) for entrant in entrants],
                mesh,
                inputs,
                count=_BUDGET_COUNT,
                repeats=self._repeats,
                tick=progress.update,
            )
            moved = floor.traffic(op, point, recv_src)
            subjects = [_subject(op, point, entrant, group) for entrant in entrants]
            rows += self._rows(subjects, taken, moved, [None] * len(entrants))
        return rows

    def _measure_reduce(self, point: ReducePoint, progress: Any) -> list[report.Row]:
        progress.set_description(f"{point.op} {point.shape}")
        group = self._group
        entrants = reduce.contenders(point, group, self._backends, self._algorithms)
        taken = reduce.measure(point, group, entrants, repeats=self._repeats, tick=progress.update)
        extra = reduce.extra_memory(point, group, entrants)
        single = None
        if self._num_steps:
            single = self._measure_steps(reduce.links(point, group, entrants))
        moved = floor.reduce_traffic(point, group.num_ranks)
        subjects = [_reduce_subject(point, group.num_ranks, entrant) for entrant in entrants]
        return self._rows(subjects, taken, moved, extra, single)

    def _measure_steps(self, links: Sequence[steps.Link]) -> list[steps.Steps] | None:
        """Times single steps, if the command asks for any."""
        if not self._num_steps:
            return None
        return steps.measure(links, self._group, num_steps=self._num_steps, delay_us=self._delay_us)

    def _rows(
        self,
        subjects: Sequence[Subject],
        taken: Sequence[timing.Timing],
        moved: floor.Traffic,
        extra: Iterable[int | None],
        single: Sequence[steps.Steps] | None = None,
    ) -> list[report.Row]:
        run = uuid.uuid4().hex
        rows = []
        one_by_one: Sequence[steps.Steps | None] = single or [None] * len(subjects)
        for subject, own, extra_bytes, own_steps in zip(
            subjects, taken, extra, one_by_one, strict=True
        ):
            measured = Measured(
                us=own.percentiles(),
                timing="chain",
                bytes=int((moved.read + moved.written).max()),
                wire_bytes=int(moved.wire.max()),
                floor_us=self._floor_us(moved),
                extra_memory_bytes=extra_bytes,
                steps=own_steps,
            )
            rows.append(report.Row(make_record(subject, measured, self._place, run), own))
        return rows

    def _floor_us(self, moved: floor.Traffic) -> float:
        if self._copy_rate is None:
            return floor.gpu_floor_us(moved)
        return floor.cpu_floor_us(moved, self._copy_rate)


def _subject(op: str, point: Point, contender: Contender, group: jax_ep.Group) -> Subject:
    sms = contender.sms
    if contender.backend == "cuda" and sms is None and contender.algorithm is None:
        sms = sms_of(point, group, *(("dispatch", "combine") if op == "round_trip" else (op,)))
    return Subject(
        op=op,
        contender=contender.name,
        backend=contender.backend,
        algorithm=contender.algorithm,
        shape=point.shape,
        num_ranks=point.num_ranks,
        tokens=point.num_tokens,
        hidden=point.hidden,
        topk=point.num_topk,
        experts=point.num_experts,
        ranks_per_node=group.ranks_per_node,
        max_nodes=point.max_nodes,
        dtype=point.dtype,
        layout=point.layout,
        recv_capacity=contender.recv_capacity,
        # Along a handle, all rows without a token are zero.
        fill="zeros" if op == "cached_dispatch" and contender.fill else contender.fill,
        sms=sms,
        cached=op == "cached_dispatch",
    )


def _reduce_subject(point: ReducePoint, num_ranks: int, contender: reduce.SumContender) -> Subject:
    return Subject(
        op=point.op,
        contender=contender.name,
        backend=contender.backend,
        algorithm=contender.algorithm,
        shape=point.shape,
        num_ranks=num_ranks,
        tokens=point.tokens,
        hidden=point.hidden,
        topk=None,
        experts=None,
        ranks_per_node=None,
        max_nodes=None,
        dtype=point.dtype,
        layout=None,
        recv_capacity=None,
        fill=None,
        sms=None,
        cached=False,
    )


def _route(point: Point, group: jax_ep.Group, backend: str, inputs: Any) -> Any:
    """recv_src [R, C] of a dispatch at the point."""
    dispatch = ours(point, group, backend, None).dispatch
    recv_src = on_ranks(lambda *own: dispatch(*own).handle.recv_src, group.mesh)(*inputs)
    return process_allgather(recv_src, tiled=True)


def measure_copy_rate() -> float | None:
    """Measures on CPUs, in process 0 while the others wait: they may share one memory."""
    if jax.devices()[0].platform != "cpu":
        return None
    return float(timing.slowest(floor.measure_copy_rate() if jax.process_index() == 0 else 0.0))


def save(
    records: Sequence[Record], ops: Iterable[str], place: Place, out: Path, *, plot: bool
) -> None:
    """Appends them to this day's file of the operations, and draws them beside it."""
    path = result_path(out, place, "-".join(dict.fromkeys(ops)))
    append_lines(path, [record.to_json() for record in records])
    kinds: dict[str, tuple[bool, Callable[[Sequence[Record], Path], None]]] = {
        "-tokens.png": (False, plots.plot_tokens),
        "-bytes.png": (True, plots.plot_bytes),
    }
    for ending, (is_reduce, draw) in kinds.items():
        own = [r for r in records if (r.op in reduce.OPS) == is_reduce]
        if plot and own:
            image = path.with_name(path.stem + ending)
            draw(own, image)
            print(f"plot: {image}")
