"""The arguments of `Group.open` and `Group.get`, checked and with their defaults."""

import hashlib
import math
from typing import Any

import jax

from jax_ep._src.base import config
from jax_ep._src.base.checks import StaticChecks, to_number
from jax_ep._src.base.errors import ConfigError, GroupError
from jax_ep._src.base.group_spec import GroupSpec
from jax_ep._src.group.settings import OpenArguments


def check_arguments(
    mesh: jax.sharding.Mesh,
    axis: str | tuple[str, ...],
    *,
    name: str | None,
    backend: str,
    timeout: float,
    num_sms: int | None,
    low_latency_bytes: int | None,
    in_flight_bytes: int | None,
    ranks_per_node: int | None,
    survives: bool | None,
    debug: bool | None,
    op: str,
) -> OpenArguments:
    """Checks the arguments of `op`, and returns them with their defaults.

    Raises: ConfigError, GroupError.
    """
    check = StaticChecks(op)
    axes = _check_mesh(mesh, axis, op)
    if backend not in ("auto", *config.BACKENDS):
        names = ", ".join(map(repr, ("auto", *config.BACKENDS)))
        raise ConfigError(f"{op}: backend must be one of {names}, got {backend!r}")
    if debug is not None and not isinstance(debug, bool):
        raise ConfigError(f"{op}: debug must be True, False or None, got {debug!r}")
    if survives is not None and not isinstance(survives, bool):
        raise ConfigError(f"{op}: survives must be True or False, got {survives!r}")
    sizes = dict(mesh.shape)
    num_ranks = math.prod(sizes[a] for a in axes)
    if ranks_per_node is not None:
        ranks_per_node = check.integer(ranks_per_node, minimum=1, name="ranks_per_node")
        if num_ranks % ranks_per_node:
            raise ConfigError(
                f"{op}: ranks_per_node must divide num_ranks={num_ranks}, got {ranks_per_node}"
            )
    seconds = to_number(timeout)
    if not 0 < seconds <= config.MAX_TIMEOUT_S:
        raise ConfigError(
            f"{op}: timeout must be positive seconds, at most "
            f"{config.MAX_TIMEOUT_S:.0f}, got {timeout!r}"
        )
    if num_sms is not None:
        num_sms = check.integer(num_sms, minimum=1, name="num_sms")
    if low_latency_bytes is None:
        low_latency_bytes = config.DEFAULT_LOW_LATENCY_BYTES
    low_latency_bytes = _room(check, low_latency_bytes, name="low_latency_bytes")
    in_flight_bytes = _room(
        check, 0 if in_flight_bytes is None else in_flight_bytes, name="in_flight_bytes"
    )
    name = name if name is not None else "_".join(axes)
    if not isinstance(name, str):
        raise ConfigError(f"{op}: name must be a string, got {name!r}")
    return OpenArguments(
        axes=axes,
        name=name,
        num_ranks=num_ranks,
        ranks_per_node=ranks_per_node,
        num_sms=num_sms,
        low_latency_bytes=low_latency_bytes,
        in_flight_bytes=in_flight_bytes,
        timeout=seconds,
        survives=bool(survives),
        spec=_make_spec(mesh, axes, name),
    )


def _room(check: StaticChecks, value: Any, *, name: str) -> int:
    """Returns the bytes of a room for packets."""
    size = check.integer(value, minimum=0, name=name)
    if size > config.MAX_LOW_LATENCY_BYTES:
        raise ConfigError(
            f"{check.op}: {name} must be at most {config.MAX_LOW_LATENCY_BYTES}, got {size}"
        )
    return size


def _check_mesh(mesh: jax.sharding.Mesh, axis: Any, op: str) -> tuple[str, ...]:
    """Returns the axes of the group as a tuple."""
    if not isinstance(mesh, jax.sharding.Mesh):
        raise GroupError(
            f"{op}: mesh must be a jax.sharding.Mesh with devices, got {type(mesh).__name__}"
        )
    return check_axis(mesh, axis, op=op)


def check_axis(mesh: Any, axis: Any, *, op: str) -> tuple[str, ...]:
    """Returns the axes of the group as a tuple; the mesh may have no devices."""
    axes = tuple(axis) if isinstance(axis, (tuple, list)) else (axis,)
    if not axes or not set(axes) <= set(mesh.axis_names) or len(set(axes)) != len(axes):
        raise GroupError(
            f"{op}: axis must name distinct axes of the mesh {tuple(mesh.axis_names)}, got {axes}"
        )
    return axes


def _make_spec(mesh: jax.sharding.Mesh, axes: tuple[str, ...], name: str) -> GroupSpec:
    mesh_axes = tuple(mesh.shape.items())
    device_ids = tuple(d.id for d in mesh.devices.flat)
    fingerprint = hashlib.sha256(repr((name, axes, mesh_axes, device_ids)).encode()).hexdigest()
    return GroupSpec(
        identity=f"{name}-{fingerprint[:16]}",
        axes=axes,
        mesh_axes=mesh_axes,
        device_ids=device_ids,
    )
