"""What the processes of a group settle before it opens: back end, tables, budgets."""

from typing import NamedTuple

import jax

from jax_ep import _backends, _native, _tuning, config
from jax_ep._backends import Usability
from jax_ep._bootstrap import Meeting
from jax_ep._open_arguments import OpenArguments


class Settings(NamedTuple):
    """The names are those of Group's fields."""

    backend: str
    debug: bool
    backends: dict[str, Usability]
    tuning: _tuning.Table
    budgets: _tuning.Budgets


def settle(
    meeting: Meeting,
    mesh: jax.sharding.Mesh,
    arguments: OpenArguments,
    *,
    backend: str,
    debug: bool | None,
) -> Settings:
    """Collective. Raises GroupError where the processes disagree; connects them."""
    debug = config.debug_from_environment() if debug is None else debug
    kind = mesh.devices.flat[0].device_kind, arguments.num_ranks
    tuning = _tuning.load(*kind)
    budgets = _tuning.load_budgets(*kind, num_sms=arguments.num_sms, is_auto=backend == "auto")
    # In front of all else: other builds may have other settings.
    meeting.agree("builds", _native.builds({d.platform for d in mesh.devices.flat}))
    meeting.agree(
        "settings",
        {
            "backend": backend,
            **{f"the table of {op}": s for op, s in _tuning.to_plain(tuning).items()},
            "num_sms": arguments.num_sms,
            **{f"the budgets of {op}": b for op, b in budgets.to_plain().items()},
            "ranks_per_node": arguments.ranks_per_node,
            "timeout": arguments.timeout,
            "debug": debug,
        },
    )
    meeting.connect(reads_memory=all(d.platform == "cpu" for d in mesh.devices.flat))
    chosen, usability = _backends.resolve(
        mesh, arguments.num_ranks, backend, meeting.why_not_linked
    )
    complete = sorted(b for b, u in usability.items() if _backends.is_complete(u))
    meeting.agree("back ends", {"the back ends that are usable": complete})
    return Settings(chosen, debug, usability, tuning, budgets)
