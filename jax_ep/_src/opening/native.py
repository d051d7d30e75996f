"""The native half of a group that opens."""

from dataclasses import replace

from jax_ep._src.base.errors import GroupError
from jax_ep._src.group.group import Group
from jax_ep._src.opening import usability
from jax_ep._src.processes.native_group import NativeOpening
from jax_ep._src.processes.rendezvous import Rendezvous


def open_native(group: Group, rendezvous: Rendezvous, backend: str, *, is_wanted: bool) -> None:
    """Opens the native half. `is_wanted`: whether the caller has named this back end."""
    opening = NativeOpening(
        group.mesh,
        group.spec,
        rendezvous,
        group.timeout,
        low_latency_bytes=group.low_latency_bytes,
        in_flight_bytes=group.in_flight_bytes,
        survives=group.survives,
    )
    opened = opening.open_cpu() if backend == "cpu" else opening.open_cuda()
    if not isinstance(opened, str):
        group.hold(opened)
        group.spec = replace(
            group.spec,
            staging_bytes=opened.staging_bytes,
            has_packets=opened.has_packets,
            low_latency_room=opened.low_latency_room,
            in_flight_room=opened.in_flight_room,
        )
        return
    why_not = f"the processes cannot map one another's memory: {opened}"
    if group.backend == backend and is_wanted:
        raise GroupError(f"Group.open: back end {backend!r} is not usable here: {why_not}")
    group.backends = usability.without_exchange(group.backends, backend, why_not)
    if group.backend == backend:
        group.backend = "xla"
