"""What jax.checkpoint and jax.export must be told."""

from typing import Any

import jax

from jax_ep import _native, config
from jax_ep.errors import GroupError


def save_communication_policy(*names: str) -> Any:
    """A policy for `jax.checkpoint` that keeps what has crossed between ranks.

    With it the backward pass recomputes everything but dispatch, combine, and all_reduce and its
    relatives.

    Args:
      names: further `checkpoint_name`s to keep.

    Returns:
      What `jax.checkpoint(layer, policy=...)` takes.

    Collective: no.
    """
    return jax.checkpoint_policies.save_only_these_names(
        config.DISPATCH_NAME, config.COMBINE_NAME, config.REDUCE_NAME, *names
    )


def export_safety_checks() -> list[jax.export.DisabledSafetyCheck]:
    """The checks that `jax.export.export(disabled_checks=...)` must leave out: our custom calls.

    A loaded export finds its group by the identity among those that are open, and says by name
    which one is missing.

    Returns:
      One check for each custom call of the back ends that are built.

    Collective: no.
    """
    targets = set()
    for backend in ("cpu", "cuda"):
        try:
            targets.update(_native.targets(backend))
        except GroupError:
            continue
    return [jax.export.DisabledSafetyCheck.custom_call(f"jax_ep.{t}") for t in sorted(targets)]
