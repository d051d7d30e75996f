"""Small messages between the processes of a group, through JAX's distributed runtime.

No XLA collective carries them: a group may be of a part of the processes, and NCCL refuses two
ranks on one GPU.
"""

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from jax_ep import _jax_compat, _registry
from jax_ep.errors import GroupError


def agree(
    identity: str, settings: Mapping[str, Any], processes: Sequence[int], *, timeout: float
) -> None:
    """Raises GroupError in every process if they open a group with different settings.

    Collective over `processes`, this one among them.
    """
    opening = _registry.count_opening(identity)
    message = json.dumps(settings).encode()
    said = gather(f"jax_ep/{identity}/{opening}", message, processes, timeout=timeout)
    theirs = {process: json.loads(text) for process, text in said.items()}
    for name in settings:
        values = {process: own[name] for process, own in theirs.items()}
        if any(value != settings[name] for value in values.values()):
            listed = ", ".join(f"process {p} has {v!r}" for p, v in values.items())
            raise GroupError(f"Group.open: the processes disagree about {name}: {listed}")


def gather(
    key: str, message: bytes, processes: Sequence[int], *, timeout: float
) -> dict[int, bytes]:
    """What each process says under `key`, which no other gathering may use.

    Raises: GroupError, naming a process that says nothing in `timeout` seconds.
    """
    client = _jax_compat.distributed_client()
    if client is None:
        raise GroupError(
            "Group.open: the mesh spans processes, but jax.distributed was not initialised"
        )
    client.key_value_set_bytes(f"{key}/{jax.process_index()}", message)
    deadline = time.monotonic() + timeout
    said = {}
    for process in processes:
        remaining_ms = max(1, int(1000 * (deadline - time.monotonic())))
        try:
            said[process] = client.blocking_key_value_get_bytes(f"{key}/{process}", remaining_ms)
        except jax.errors.JaxRuntimeError as e:
            raise GroupError(
                f"Group.open: process {process} did not open the same group (name, axes, devices) "
                f"within {timeout:g} s: {e}"
            ) from e
    return said
