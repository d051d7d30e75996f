"""Which back ends there are, which are usable where, and how the operations reach them."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from jax_ep import _native, _xla, _xla_reduce, config
from jax_ep._primitives.all_reduce import all_reduce
from jax_ep._primitives.all_reduce_residual_rmsnorm import all_reduce_residual_rmsnorm
from jax_ep._primitives.combine import combine, combine_workspace_bytes
from jax_ep._primitives.dispatch import dispatch
from jax_ep._primitives.pull_rows import pull_rows
from jax_ep._spec import CallSpec, CombineSpec, DispatchSpec, ReduceSpec, Routed, RowIndex
from jax_ep.errors import GroupError

_OPS = frozenset(
    {
        "dispatch",
        "dispatch_fp8",
        "combine",
        "combine_weights",
        "get_dispatch_layout",
        "all_reduce",
        "reduce_scatter",
        "all_gather",
        "all_reduce_residual_rmsnorm",
    }
)
_LOCAL_OPS = frozenset({"get_dispatch_layout"})
_NO_OPS: frozenset[str] = frozenset()


class Usability(NamedTuple):
    """What a back end can do for a group: the public operations, and the reason in words."""

    ops: frozenset[str]
    reason: str


class Backend(NamedTuple):
    """The communicating operations. Inside shard_map, on arrays that vary over the group."""

    dispatch: Callable[
        [DispatchSpec, jax.Array, jax.Array | None, Sequence[jax.Array]], Routed
    ]  # spec, topk_idx, topk_weights, rows
    pull_rows: Callable[..., jax.Array]  # spec, index, rows, *, slot, num_slots
    combine: Callable[
        [CombineSpec, RowIndex, jax.Array, jax.Array | None, Sequence[jax.Array]], jax.Array
    ]  # spec, index, rows, weights, biases
    all_reduce: Callable[[ReduceSpec, jax.Array], jax.Array]  # and its halves
    all_reduce_residual_rmsnorm: Callable[
        [ReduceSpec, jax.Array, jax.Array, jax.Array, float], tuple[jax.Array, jax.Array]
    ]  # spec, x, residual, scale, eps


_STOCK_COLLECTIVES = Backend(
    _xla.dispatch,
    _xla.pull_rows,
    _xla.combine,
    _xla_reduce.all_reduce,
    _xla_reduce.all_reduce_residual_rmsnorm,
)


def _dispatch(
    spec: DispatchSpec,
    topk_idx: jax.Array,
    topk_weights: jax.Array | None,
    rows: Sequence[jax.Array],
) -> Routed:
    """Custom calls, unless the group stages operands and these have no room; so do the others."""
    can_stage = spec.group.can_stage(topk_idx, topk_weights, *rows)
    return (dispatch if can_stage else _xla.dispatch)(spec, topk_idx, topk_weights, rows)


def _pull_rows(spec: CallSpec, index: jax.Array, rows: jax.Array, **slots: Any) -> jax.Array:
    can_stage = spec.group.can_stage(rows)
    return (pull_rows if can_stage else _xla.pull_rows)(spec, index, rows, **slots)


def _combine(
    spec: CombineSpec,
    index: RowIndex,
    rows: jax.Array,
    weights: jax.Array | None,
    biases: Sequence[jax.Array],
) -> jax.Array:
    scratch = combine_workspace_bytes(spec, index, rows)
    can_stage = spec.group.can_stage(
        rows, weights, index.send_rank, index.send_row, scratch_bytes=scratch
    )
    return (combine if can_stage else _xla.combine)(spec, index, rows, weights, biases)


def _all_reduce(spec: ReduceSpec, x: jax.Array) -> jax.Array:
    """Custom calls, unless peers would have to read what they cannot; the sums have equal bits."""
    is_carried = spec.is_carried(x)
    return (all_reduce if is_carried else _xla_reduce.all_reduce)(spec, x)


_CUSTOM_CALLS = Backend(_dispatch, _pull_rows, _combine, _all_reduce, all_reduce_residual_rmsnorm)


def get(backend: str) -> Backend:
    """The operations of a back end."""
    return _STOCK_COLLECTIVES if backend == "xla" else _CUSTOM_CALLS


def resolve(
    mesh: jax.sharding.Mesh, num_ranks: int, requested: str, why_not_linked: str | None
) -> tuple[str, dict[str, Usability]]:
    """The back end of a group over `mesh`, and of each one what it can do here, and why.

    `why_not_linked`: why the processes of the mesh cannot reach one another, if they cannot.
    """
    found = {
        "cpu": _cpu(mesh, why_not_linked),
        "cuda": _cuda(mesh, num_ranks, why_not_linked),
        "xla": Usability(_OPS, "usable"),
    }
    complete = [b for b in config.BACKENDS if is_complete(found[b])]
    if requested == "auto":
        return complete[0], found
    if requested not in complete:
        raise GroupError(
            f"Group.open: backend {requested!r} is not usable here: {found[requested].reason}"
        )
    return requested, found


def without_exchange(
    found: dict[str, Usability], backend: str, why_not: str
) -> dict[str, Usability]:
    """What is left when a back end turns out to be of no use between the ranks."""
    return {**found, backend: _local_only(why_not)}


def why_no_custom_calls(mesh: jax.sharding.Mesh, found: dict[str, Usability]) -> str | None:
    """Why a mesh of devices that have custom calls is left to `xla`; None: it is not."""
    own = {"cpu": "cpu", "gpu": "cuda"}.get(mesh.devices.flat[0].platform)
    return None if own is None or is_complete(found[own]) else found[own].reason


def is_complete(usability: Usability) -> bool:
    """Whether a back end can do everything."""
    return usability.ops >= _OPS


def _platforms(mesh: jax.sharding.Mesh) -> set[str]:
    return {d.platform for d in mesh.devices.flat}


def _cpu(mesh: jax.sharding.Mesh, why_not_linked: str | None) -> Usability:
    if _platforms(mesh) != {"cpu"}:
        return Usability(_NO_OPS, "the mesh's devices are not CPU devices")
    if why_not_linked is not None:
        return Usability(_NO_OPS, why_not_linked)
    try:
        _native.load("cpu")
    except GroupError as e:
        return Usability(_NO_OPS, str(e))
    return Usability(_OPS, "usable")


def _cuda(mesh: jax.sharding.Mesh, num_ranks: int, why_not_linked: str | None) -> Usability:
    if _platforms(mesh) != {"gpu"}:
        return Usability(_NO_OPS, "the mesh's devices are not GPUs")
    own = [d for d in mesh.devices.flat if d.process_index == jax.process_index()]
    why_not = why_not_linked or config.why_no_kernel_exchange(num_ranks)
    try:
        native = _native.load("cuda")
    except GroupError as e:
        return Usability(_NO_OPS, str(e))
    if why_not is None:
        try:
            native.check_devices([_native.cuda_device_of(d) for d in own])
        except RuntimeError as e:
            why_not = str(e)
    if why_not is None:
        return Usability(_OPS, "usable")
    return _local_only(why_not)


def _local_only(why_not: str) -> Usability:
    return Usability(_LOCAL_OPS, f"usable for {', '.join(_LOCAL_OPS)} only: {why_not}")
