"""The choice of the algorithm that carries a call of the all_reduce family."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jax_ep._src.base import limits, tables
from jax_ep._src.base.errors import ConfigError
from jax_ep._src.base.options import Algorithm, Movement
from jax_ep._src.base.spec import ReduceSpec
from jax_ep._src.group.group import Group
from jax_ep._src.ops.common.checks import Checks

SUM_DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32, jnp.int32)
_UNLIMITED = 1 << 62


def make_spec(
    check: Checks,
    group: Any,
    x: jax.Array,
    num_bytes: int,
    *,
    algorithm: str,
    allow_psum: bool,
    backend: str | None,
    dtypes: Sequence[Any] | None = SUM_DTYPES,
    movement: Movement = Movement.ALL_REDUCE,
    padding: int = 0,
    kernel: str | None = None,
) -> ReduceSpec:
    """Chooses the algorithm and returns the static facts of the call; equal on all ranks.

    Args:
      check: checks of the public operation.
      group: the group that the caller passed, not yet checked.
      x: the operand.
      num_bytes: bytes that come from each rank.
      algorithm: "auto", or the name of an algorithm.
      allow_psum: whether "auto" may choose XLA's collective.
      backend: the back end that the caller passed, or None.
      dtypes: dtypes that the custom call takes; None: any.
      movement: the collective.
      padding: bytes that slots have to hold besides the operand.
      kernel: operation whose table and limits apply; None: the public operation.

    Raises: GroupError, ConfigError, DTypeError.
    """
    group = check.group(group)
    kernel = check.op if kernel is None else kernel
    spec = partial(
        ReduceSpec,
        group.spec,
        check.backend(backend, group),
        movement=movement,
        op=check.op,
    )
    if algorithm == "auto":
        stock = spec(Algorithm.PSUM)
        chosen = choose(
            check,
            group,
            stock,
            x,
            num_bytes,
            kernel=kernel,
            allow_psum=allow_psum,
            dtypes=dtypes,
            padding=padding,
        )
        return spec(chosen)
    wanted = check.choice(Algorithm, algorithm, name="algorithm", also=("auto",))
    if wanted is Algorithm.TWO_SHOT and check.op != "all_reduce":
        raise ConfigError(f"{check.op}: algorithm must not be 'two_shot': only all_reduce has it")
    if wanted is Algorithm.PSUM and not allow_psum:
        raise ConfigError(f"{check.op}: allow_psum=False forbids algorithm='psum'")
    if wanted is not Algorithm.PSUM:
        _require_operand(check, x, dtypes)
        if wanted is Algorithm.LOW_LATENCY and not group.spec.has_packets:
            raise ConfigError(
                f"{check.op}: algorithm={algorithm!r} needs GPUs with native atomics between them "
                "(NVLink): without them the 16 bytes of a vector may arrive in parts"
            )
        most = _carried(group, spec(wanted), x, kernel, padding)[wanted]
        if most < num_bytes:
            raise ConfigError(
                f"{check.op}: algorithm={algorithm!r} takes at most {max(0, most)} bytes from a "
                f"rank here, got {num_bytes}"
            )
    return spec(wanted)


def choose(
    check: Checks,
    group: Group,
    spec: ReduceSpec,
    x: jax.Array,
    num_bytes: int,
    *,
    kernel: str,
    allow_psum: bool,
    dtypes: Sequence[Any] | None,
    padding: int,
) -> Algorithm:
    """Returns the algorithm for "auto". `spec` names the back end; the rest is as in make_spec."""
    is_known = dtypes is None or x.dtype in [jnp.dtype(d) for d in dtypes]
    if allow_psum and (not is_known or x.size == 0 or spec.backend == "xla"):
        return Algorithm.PSUM
    _require_operand(check, x, dtypes)
    if spec.backend != "cuda":
        return Algorithm.ONE_SHOT
    carried = _carried(group, spec, x, kernel, padding)
    allowed = [a for a, most in carried.items() if num_bytes <= most]
    choices = [*allowed, Algorithm.PSUM] if allow_psum else allowed
    chosen = tables.pick(group.tuning, kernel, num_bytes, choices)
    if chosen is not None:
        return chosen
    if allow_psum:
        return Algorithm.PSUM
    if not allowed:
        raise ConfigError(
            f"{check.op}: no algorithm but psum takes {num_bytes} bytes from a rank here"
        )
    return allowed[-1]


def _require_operand(check: Checks, x: jax.Array, dtypes: Sequence[Any] | None) -> None:
    if dtypes is not None:
        check.dtype(x, dtypes, name="x, for all algorithms but psum,")
    if x.size == 0:
        raise ConfigError(f"{check.op}: only psum takes an x without elements, got shape {x.shape}")


def _carried(
    group: Group, spec: ReduceSpec, x: jax.Array, kernel: str, padding: int
) -> dict[Algorithm, int]:
    """Returns the bytes from each rank that each algorithm can carry; -1: it cannot be used.

    The last algorithm is for the largest arrays.
    """
    most = limits.slot_payload(group.num_ranks) - padding if group.spec.has_packets else -1
    slots = {Algorithm.LOW_LATENCY: most}
    if spec.backend != "cuda":
        # Slots have the GPUs' limit on CPUs, too: a program that runs on CPUs runs on GPUs.
        return slots | dict.fromkeys((Algorithm.ONE_SHOT, Algorithm.TWO_SHOT), _UNLIMITED)
    pushed = -1 if kernel == "all_reduce_residual_rmsnorm" else limits.push_payload(group.num_ranks)
    # A large two-shot reads results of its peers in place, and results are never staged.
    pulls = group.spec.staging_bytes is None
    two_shot = _UNLIMITED if pulls else limits.two_shot_payload(group.num_ranks)
    return slots | {
        Algorithm.ONE_SHOT: _UNLIMITED if group.spec.can_stage(x) else pushed,
        Algorithm.TWO_SHOT: two_shot if kernel == "all_reduce" else -1,
    }
