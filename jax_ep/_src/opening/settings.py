"""Agreement of a group's processes before it opens: back end, nodes, tables, budgets."""

import jax

from jax_ep._src.base import config, native_modules, tables
from jax_ep._src.group.settings import OpenArguments, Settings
from jax_ep._src.opening import usability
from jax_ep._src.processes.domains import Nodes, find_nodes
from jax_ep._src.processes.rendezvous import Rendezvous


def agree_on_settings(
    rendezvous: Rendezvous,
    mesh: jax.sharding.Mesh,
    arguments: OpenArguments,
    *,
    backend: str,
    debug: bool | None,
) -> Settings:
    """Connects the processes and returns their settings. Collective.

    Raises: GroupError if the processes disagree.
    """
    debug = config.debug_from_environment() if debug is None else debug
    kind = mesh.devices.flat[0].device_kind
    tuning = tables.load(kind, arguments.num_ranks)
    # Builds are compared first: another build may have other settings.
    rendezvous.agree("builds", native_modules.builds({d.platform for d in mesh.devices.flat}))
    rendezvous.agree(
        "settings",
        {
            "backend": backend,
            **{f"the table of {op}": s for op, s in tables.to_plain(tuning).items()},
            "num_sms": arguments.num_sms,
            "low_latency_bytes": arguments.low_latency_bytes,
            "in_flight_bytes": arguments.in_flight_bytes,
            "timeout": arguments.timeout,
            "survives": arguments.survives,
            "debug": debug,
        },
    )
    rendezvous.connect(reads_memory=all(d.platform == "cpu" for d in mesh.devices.flat))
    chosen, backends = usability.resolve(
        mesh, arguments.num_ranks, backend, rendezvous.why_not_linked
    )
    complete = sorted(b for b, u in backends.items() if usability.is_complete(u))
    nodes = _find_nodes(rendezvous, mesh, arguments)
    # Several nodes run exchanges of their ranks. A table that prefers `xla` has measured one level.
    has_one_node = nodes.ranks_per_node == arguments.num_ranks
    budgets = tables.load_budgets(
        kind,
        nodes.ranks_per_node,
        num_sms=arguments.num_sms,
        is_auto=backend == "auto" and has_one_node,
    )
    rendezvous.agree(
        "back ends",
        {
            "the back ends that are usable": complete,
            # Compared here: the default number, and with it the budgets, come from the hosts.
            "ranks_per_node": nodes.ranks_per_node,
            **{f"the budgets of {op}": b for op, b in budgets.to_plain().items()},
        },
    )
    return Settings(chosen, nodes, debug, backends, tuning, budgets)


def _find_nodes(rendezvous: Rendezvous, mesh: jax.sharding.Mesh, arguments: OpenArguments) -> Nodes:
    """Returns the nodes that the caller asks for, or those of the machines."""
    if arguments.ranks_per_node is not None:
        return Nodes(arguments.ranks_per_node, "the argument of Group.open")
    if rendezvous.is_alone:
        return Nodes(arguments.num_ranks, "all ranks are in one process")
    devices = list(mesh.devices.flat)
    domains = [[""] * arguments.num_ranks for _ in range(len(devices) // arguments.num_ranks)]
    for position in arguments.spec.positions():
        process = devices[position.place].process_index
        domains[position.slice][position.rank] = rendezvous.domains[process]
    return find_nodes(domains)
