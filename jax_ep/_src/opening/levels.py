"""The parts of a group with several nodes: its nodes, and its rails between them.

Both are groups of their own, over the same devices, which only their group knows.
"""

from dataclasses import replace

from jax_ep._src.base.group_spec import Cut, Levels
from jax_ep._src.group.group import Group
from jax_ep._src.group.settings import OpenArguments, Settings
from jax_ep._src.opening import self_test, usability
from jax_ep._src.opening.native import open_native
from jax_ep._src.processes.domains import Nodes
from jax_ep._src.processes.rendezvous import Rendezvous


def open_levels(group: Group, arguments: OpenArguments, settings: Settings, *, wanted: str) -> None:
    """Opens the parts of a group. Collective.

    Where custom calls cannot carry a part, JAX's collectives do. `wanted`: the back end that the
    caller of Group.open has named, or "auto".
    """
    for is_rail in (False, True):
        cut = Cut(group.ranks_per_node, is_rail=is_rail)
        group.add_part(_open_part(group, arguments, settings, cut, wanted=wanted))
    node, rail = group.parts
    levels = Levels(node.spec, rail.spec, inside=node.backend, between=rail.backend)
    group.spec = replace(group.spec, levels=levels)
    own = node.backend
    if own != "xla" and not usability.is_complete(group.backends[own]):
        group.backends = usability.with_levels(group.backends, own)
        if wanted == "auto":
            group.backend = own


def _open_part(
    group: Group, arguments: OpenArguments, settings: Settings, cut: Cut, *, wanted: str
) -> Group:
    """Opens one kind of part. It has no room for few tokens, whose operations are flat."""
    spec = arguments.spec.cut_into(cut)
    owners = [device.process_index for device in group.mesh.devices.flat]
    slices = [position.slice for position in spec.positions()]
    with Rendezvous(spec.identity, owners, slices, timeout=group.timeout) as rendezvous:
        rendezvous.connect(reads_memory=all(d.platform == "cpu" for d in group.mesh.devices.flat))
        chosen, backends = usability.resolve(
            group.mesh, spec.num_ranks, "auto", rendezvous.why_not_linked
        )
        complete = sorted(b for b, u in backends.items() if usability.is_complete(u))
        rendezvous.agree("back ends", {f"the back ends of {spec.identity}": complete})
        part = Group(
            group.mesh,
            arguments._replace(
                num_ranks=spec.num_ranks,
                low_latency_bytes=0,
                in_flight_bytes=0,
                spec=spec,
            ),
            settings._replace(
                backend=chosen,
                nodes=Nodes(spec.num_ranks, "a part of a group"),
                backends=backends,
                debug=False,
            ),
            rendezvous,
        )
        try:
            if chosen != "xla":
                open_native(part, rendezvous, chosen, is_wanted=wanted == chosen)
            rendezvous.gather("native half", None)
            self_test.run(part, rendezvous)
            rendezvous.gather("self-test", None)
        except BaseException:
            part.discard()
            raise
    return part
