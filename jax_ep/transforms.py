"""What jax.checkpoint and jax.export must be told."""

from typing import Any

import jax

from jax_ep import _native, config
from jax_ep.errors import GroupError


def save_communication_policy(*names: str) -> Any:
    """Makes a policy for `jax.checkpoint` that keeps everything that crossed between ranks.

    With it the backward pass recomputes everything except dispatch, combine, and the all_reduce
    family.

    Args:
      names: further `checkpoint_name`s to keep.

    Returns:
      A policy for `jax.checkpoint(layer, policy=...)`.

    Collective: no.
    """
    return jax.checkpoint_policies.save_only_these_names(
        config.DISPATCH_NAME, config.COMBINE_NAME, config.REDUCE_NAME, *names
    )


def export_safety_checks() -> list[jax.export.DisabledSafetyCheck]:
    """Lists the checks that `jax.export.export(disabled_checks=...)` must leave out.

    They concern our custom calls. A loaded export finds its group among those that are open, by
    its identity, and names the group if it is missing.

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
