"""Policies and checks to pass to jax.checkpoint and jax.export."""

from typing import Any

import jax

from jax_ep._src.base import native_modules
from jax_ep._src.base.errors import GroupError
from jax_ep._src.base.operations import OPERATIONS


def save_communication_policy(*names: str) -> Any:
    """Returns a policy for `jax.checkpoint` that keeps the arrays that have crossed between ranks.

    The backward pass then recomputes everything but dispatch, combine, and the all_reduce family.

    Args:
      names: further `checkpoint_name`s to keep.

    Returns:
      A policy for `jax.checkpoint(layer, policy=...)`.

    Collective: no.
    """
    return jax.checkpoint_policies.save_only_these_names(
        *{op.checkpoint_name for op in OPERATIONS if op.checkpoint_name is not None}, *names
    )


def export_safety_checks() -> list[jax.export.DisabledSafetyCheck]:
    """Returns the safety checks of `jax.export` that refuse jax_ep's custom calls.

    Pass them to `jax.export.export(disabled_checks=...)`. A loaded export looks for its group
    among the open groups by identity. If the group is not open, the error names it.

    Returns:
      One check for each custom call of the back ends that are built.

    Collective: no.
    """
    targets = set()
    for backend in ("cpu", "cuda"):
        try:
            targets.update(native_modules.targets(backend))
        except GroupError:
            continue
    return [jax.export.DisabledSafetyCheck.custom_call(f"jax_ep.{t}") for t in sorted(targets)]
