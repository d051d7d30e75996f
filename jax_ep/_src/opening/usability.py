"""Usability of each back end for a group: the operations that it can carry, and the reason."""

import jax

from jax_ep._src.base import config, native_modules
from jax_ep._src.base.errors import GroupError
from jax_ep._src.base.operations import OPERATIONS
from jax_ep._src.base.spec import Usability

_OPS = frozenset(op.name for op in OPERATIONS)
_LOCAL_OPS = frozenset(op.name for op in OPERATIONS if op.is_local)
_LEVEL_OPS = frozenset(op.name for op in OPERATIONS if op.has_levels)
_NO_OPS: frozenset[str] = frozenset()


def resolve(
    mesh: jax.sharding.Mesh, num_ranks: int, requested: str, why_not_linked: str | None
) -> tuple[str, dict[str, Usability]]:
    """Returns the back end of a group over `mesh`, and the usability of each back end.

    `why_not_linked`: why the processes of the mesh cannot reach one another, or None.
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
    """Returns `found` with a back end that cannot exchange data between the ranks."""
    return {**found, backend: _local_only(why_not)}


def with_levels(found: dict[str, Usability], backend: str) -> dict[str, Usability]:
    """Returns `found` with a back end that carries exchanges inside the nodes, but not others."""
    ops = found[backend].ops | _LEVEL_OPS
    listed = ", ".join(op.name for op in OPERATIONS if op.name in ops)
    reason = f"usable for {listed} only, inside the nodes: {found[backend].reason}"
    return {**found, backend: Usability(ops, reason)}


def why_no_custom_calls(mesh: jax.sharding.Mesh, found: dict[str, Usability]) -> str | None:
    """Returns why a mesh of CPUs or GPUs takes back end `xla`; None if custom calls carry it."""
    own = {"cpu": "cpu", "gpu": "cuda"}.get(mesh.devices.flat[0].platform)
    return None if own is None or is_complete(found[own]) else found[own].reason


def is_complete(usability: Usability) -> bool:
    """Returns whether a back end can carry every operation."""
    return usability.ops >= _OPS


def _platforms(mesh: jax.sharding.Mesh) -> set[str]:
    return {d.platform for d in mesh.devices.flat}


def _cpu(mesh: jax.sharding.Mesh, why_not_linked: str | None) -> Usability:
    if _platforms(mesh) != {"cpu"}:
        return Usability(_NO_OPS, "the mesh's devices are not CPU devices")
    if why_not_linked is not None:
        return Usability(_NO_OPS, why_not_linked)
    try:
        native_modules.load("cpu")
    except GroupError as e:
        return Usability(_NO_OPS, str(e))
    return Usability(_OPS, "usable")


def _cuda(mesh: jax.sharding.Mesh, num_ranks: int, why_not_linked: str | None) -> Usability:
    if _platforms(mesh) != {"gpu"}:
        return Usability(_NO_OPS, "the mesh's devices are not GPUs")
    own = [d for d in mesh.devices.flat if d.process_index == jax.process_index()]
    why_not = why_not_linked or config.why_no_kernel_exchange(num_ranks)
    try:
        native = native_modules.load("cuda")
    except GroupError as e:
        return Usability(_NO_OPS, str(e))
    if why_not is None:
        try:
            native.check_devices([native_modules.cuda_device_of(d) for d in own])
        except RuntimeError as e:
            why_not = str(e)
    if why_not is None:
        return Usability(_OPS, "usable")
    return _local_only(why_not)


def _local_only(why_not: str) -> Usability:
    return Usability(_LOCAL_OPS, f"usable for {', '.join(_LOCAL_OPS)} only: {why_not}")
