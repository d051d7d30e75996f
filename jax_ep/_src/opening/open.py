"""Bodies of `Group.open` and `Group.get`."""

import warnings
from contextlib import ExitStack
from typing import Any, TypeVar, cast

import jax

from jax_ep._src.base import config, jax_compat, native_modules, registry
from jax_ep._src.base.errors import GroupError
from jax_ep._src.group.group import Group
from jax_ep._src.group.settings import OpenArguments
from jax_ep._src.opening import lookup, self_test, usability
from jax_ep._src.opening.arguments import check_arguments
from jax_ep._src.opening.levels import open_levels
from jax_ep._src.opening.native import open_native
from jax_ep._src.opening.settings import agree_on_settings
from jax_ep._src.processes.rendezvous import Rendezvous, meet_processes

_Group = TypeVar("_Group", bound=Group)
_TO_CALLER = 5  # frames from a warning here to the caller of Group.open or Group.get


def open_group(
    kind: type[_Group], mesh: jax.sharding.Mesh, axis: str | tuple[str, ...], **options: Any
) -> _Group:
    """Opens a group. `options`: all other arguments of Group.open."""
    arguments = check_arguments(mesh, axis, op="Group.open", **options)
    with registry.opening(arguments.spec.identity):
        return _open(kind, mesh, arguments, **options)


def get_group(
    kind: type[_Group],
    mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh | None,
    axis: str | tuple[str, ...] | None,
    *,
    timeout: float | None,
    **options: Any,
) -> _Group:
    """Finds or opens a group. `options`: all other arguments of Group.get."""
    found = lookup.find_mesh(mesh, axis, options["name"])
    arguments = check_arguments(
        found,
        lookup.find_axis(found, axis),
        timeout=config.DEFAULT_TIMEOUT_S if timeout is None else timeout,
        op="Group.get",
        **options,
    )
    with registry.opening(arguments.spec.identity):
        group = registry.open_groups.get(arguments.spec.identity)
        if group is None:
            return _open(kind, found, arguments, **options)
        group.require_usable("Group.get")
        backend = options["backend"]
        lookup.require_settings(
            group,
            backend=None if backend == "auto" else backend,
            timeout=None if timeout is None else arguments.timeout,
            num_sms=arguments.num_sms,
            low_latency_bytes=(
                None if options["low_latency_bytes"] is None else arguments.low_latency_bytes
            ),
            in_flight_bytes=(
                None if options["in_flight_bytes"] is None else arguments.in_flight_bytes
            ),
            ranks_per_node=arguments.ranks_per_node,
            survives=options["survives"],
            debug=options["debug"],
        )
        return cast(_Group, group)


def _open(
    kind: type[_Group],
    mesh: jax.sharding.Mesh,
    arguments: OpenArguments,
    *,
    backend: str,
    debug: bool | None,
    **_: Any,
) -> _Group:
    identity = arguments.spec.identity
    slices = [position.slice for position in arguments.spec.positions()]
    with (
        jax_compat.clean_context(),
        ExitStack() as undo,
        meet_processes(
            mesh, identity, slices, timeout=arguments.timeout, stacklevel=_TO_CALLER
        ) as rendezvous,
    ):
        if identity in registry.open_groups:
            raise GroupError(
                f"Group.open: a group named {arguments.name!r} over the same axes and devices "
                "is open; pass another name="
            )
        settings = agree_on_settings(rendezvous, mesh, arguments, backend=backend, debug=debug)
        rendezvous.start_beats()
        group = kind(mesh, arguments, settings, rendezvous)
        undo.callback(group.discard)
        if group.backends["cuda"].ops:
            native_modules.register("cuda")
        for own in ("cpu", "cuda"):
            if usability.is_complete(group.backends[own]):
                open_native(group, rendezvous, own, is_wanted=backend == settings.backend)
        if group.ranks_per_node < group.num_ranks:
            open_levels(group, arguments, settings, wanted=backend)
        group.watch_interrupts()
        registry.open_groups[identity] = group
        # Ranks wait for one another in the self-test, where no news of a failure reaches them.
        rendezvous.gather("native half", None)
        self_test.run(group, rendezvous)
        rendezvous.gather("self-test", None)
        if backend == "auto":
            _warn_of_fallback(group, rendezvous)
        undo.pop_all()
    return group


def _warn_of_fallback(group: Group, rendezvous: Rendezvous) -> None:
    """Warns in one process: the reason is equal in all processes.

    If the program turns warnings into errors, no process opens the group.
    """
    why_not = usability.why_no_custom_calls(group.mesh, group.backends)
    if why_not is None or group.backend != "xla":
        return
    if rendezvous.processes[0] == jax.process_index():
        warnings.warn(
            f"Group.open: group {group.identity} runs on stock collectives, back end 'xla': "
            f"{why_not}",
            stacklevel=_TO_CALLER,
        )
    rendezvous.gather("warning", None)
