"""What all_reduce and its relatives share: the choice of an algorithm, and the gradients.

Under check_vma=True an all_reduce takes what varies over the group's axes to what does not, and its
transpose moves nothing; under check_vma=False it is its own transpose. Which of the two it is is
known from the operand's type when it is traced, as for lax.psum.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jax_ep import _backends, _checks, _jax_compat, _limits, _tuning, _xla_reduce, config
from jax_ep._spec import ReduceSpec, gradient_of
from jax_ep.config import Algorithm, Movement
from jax_ep.errors import ConfigError
from jax_ep.group import Group

SUM_DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32, jnp.int32)
_UNLIMITED = 1 << 62


def make_spec(
    group: Any,
    x: jax.Array,
    num_bytes: int,
    *,
    op: str,
    algorithm: str,
    allow_psum: bool,
    backend: str | None,
    dtypes: Sequence[Any] | None = SUM_DTYPES,
    movement: Movement = Movement.ALL_REDUCE,
    padding: int = 0,
    kernel: str | None = None,
) -> ReduceSpec:
    """The call's static facts, with the algorithm chosen; equal on all ranks.

    Args:
      group: the ranks, or what was passed in their place.
      x: the operand.
      num_bytes: that come from each rank.
      op: the public name.
      algorithm: "auto", or one by name.
      allow_psum: whether "auto" may choose the stock collective.
      backend: the caller's, or None.
      dtypes: what the custom call takes; None: anything.
      movement: what becomes of the operands.
      padding: bytes that packets have to carry beside them.
      kernel: whose table and limits are meant; None: those of `op`.

    Raises: GroupError, ConfigError, DTypeError.
    """
    group = _checks.require_group(group, op=op)
    kernel = op if kernel is None else kernel
    spec = partial(
        ReduceSpec,
        group.spec,
        _checks.require_backend(backend, group, op=op),
        movement=movement,
        op=op,
    )
    if algorithm == "auto":
        stock = spec(Algorithm.PSUM)
        chosen = choose(
            group,
            stock,
            x,
            num_bytes,
            op=op,
            kernel=kernel,
            allow_psum=allow_psum,
            dtypes=dtypes,
            padding=padding,
        )
        return spec(chosen)
    wanted = config.choice(Algorithm, algorithm, op=op, argument="algorithm", also=("auto",))
    if wanted is Algorithm.TWO_SHOT and op != "all_reduce":
        raise ConfigError(f"{op}: algorithm must not be 'two_shot'; there is none")
    if wanted is Algorithm.PSUM and not allow_psum:
        raise ConfigError(f"{op}: allow_psum=False forbids algorithm='psum'")
    if wanted is not Algorithm.PSUM:
        _require_operand(x, dtypes, op)
        if wanted is Algorithm.LOW_LATENCY and not group.spec.has_packets:
            raise ConfigError(
                f"{op}: algorithm={algorithm!r} needs GPUs with native atomics between them "
                "(NVLink): elsewhere the 16 bytes of a packet may arrive in parts"
            )
        most = _most_bytes(group, spec(wanted), x, kernel, padding)[wanted]
        if most < num_bytes:
            raise ConfigError(
                f"{op}: algorithm={algorithm!r} takes at most {max(0, most)} bytes from a rank "
                f"here, got {num_bytes}"
            )
    return spec(wanted)


def choose(
    group: Group,
    spec: ReduceSpec,
    x: jax.Array,
    num_bytes: int,
    *,
    op: str,
    kernel: str,
    allow_psum: bool,
    dtypes: Sequence[Any] | None,
    padding: int,
) -> Algorithm:
    """What "auto" stands for; `spec` names the back end. Otherwise as in make_spec."""
    is_known = dtypes is None or x.dtype in [jnp.dtype(d) for d in dtypes]
    if allow_psum and (not is_known or x.size == 0 or spec.backend == "xla"):
        return Algorithm.PSUM
    _require_operand(x, dtypes, op)
    if spec.backend != "cuda":
        return Algorithm.ONE_SHOT
    limits = _most_bytes(group, spec, x, kernel, padding)
    allowed = [a for a, most in limits.items() if num_bytes <= most]
    choices = [*allowed, Algorithm.PSUM] if allow_psum else allowed
    chosen = _tuning.pick(group.tuning, kernel, num_bytes, choices)
    if chosen is not None:
        return chosen
    if allow_psum:
        return Algorithm.PSUM
    if not allowed:
        raise ConfigError(f"{op}: no algorithm but psum takes {num_bytes} bytes from a rank here")
    return allowed[-1]


def _require_operand(x: jax.Array, dtypes: Sequence[Any] | None, op: str) -> None:
    if dtypes is not None:
        _checks.require_dtype(x, dtypes, op=op, argument="x, for all algorithms but psum,")
    if x.size == 0:
        raise ConfigError(f"{op}: psum alone takes an x without elements, got shape {x.shape}")


def _most_bytes(
    group: Group, spec: ReduceSpec, x: jax.Array, kernel: str, padding: int
) -> dict[Algorithm, int]:
    """Bytes from each rank that an algorithm can carry, -1 for none; the last for the largest."""
    most = _limits.packet_payload(group.num_ranks) - padding if group.spec.has_packets else -1
    packets = {Algorithm.LOW_LATENCY: most}
    if spec.backend != "cuda":
        # Packets have their limit everywhere: a program that runs here runs there.
        return packets | dict.fromkeys((Algorithm.ONE_SHOT, Algorithm.TWO_SHOT), _UNLIMITED)
    pushed = (
        -1 if kernel == "all_reduce_residual_rmsnorm" else _limits.push_payload(group.num_ranks)
    )
    # A large two-shot reads results of peers, which are never staged.
    pulls = group.spec.staging_bytes is None
    two_shot = _UNLIMITED if pulls else _limits.two_shot_payload(group.num_ranks)
    return packets | {
        Algorithm.ONE_SHOT: _UNLIMITED if group.spec.can_stage(x) else pushed,
        Algorithm.TWO_SHOT: two_shot if kernel == "all_reduce" else -1,
    }


def move(spec: ReduceSpec, x: jax.Array) -> jax.Array:
    """The operation, with its gradient, on an array that varies over the group's axes."""
    if spec.algorithm is Algorithm.PSUM:
        return named(_xla_reduce.stock(spec, x))
    return named(_move(typed(spec, x), x))


def named(result: jax.Array) -> jax.Array:
    """What save_communication_policy keeps."""
    kept: jax.Array = checkpoint_name(result, config.REDUCE_NAME)
    return kept


def typed(spec: ReduceSpec, x: jax.Array) -> ReduceSpec:
    """`spec`, with whether check_vma is on, seen by an array that varies over the group's axes."""
    is_typed = set(spec.group.axes) <= _jax_compat.varying_axes(jax.typeof(x))
    return replace(spec, is_typed=is_typed)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _move(spec: ReduceSpec, x: jax.Array) -> jax.Array:
    return _backends.get(spec.backend).all_reduce(spec, x)


def _move_fwd(spec: ReduceSpec, x: jax.Array) -> tuple[jax.Array, None]:
    return _move(spec, x), None


def _move_bwd(spec: ReduceSpec, _: None, ct: jax.Array) -> tuple[jax.Array]:
    if spec.movement is Movement.ALL_REDUCE:
        return (transpose_of_sum(spec, ct),)
    spec = replace(spec, op=gradient_of(spec.op))
    back = {
        Movement.REDUCE_SCATTER: Movement.ALL_GATHER,
        Movement.ALL_GATHER: Movement.REDUCE_SCATTER,
    }[spec.movement]
    spec = replace(spec, movement=back)
    if back is Movement.REDUCE_SCATTER and ct.dtype not in [jnp.dtype(d) for d in SUM_DTYPES]:
        return (_xla_reduce.stock(replace(spec, algorithm=Algorithm.PSUM), ct),)
    # As many bytes from each rank, so the same algorithm.
    return (_move(spec, ct),)


_move.defvjp(_move_fwd, _move_bwd)


def transpose_of_sum(spec: ReduceSpec, ct: jax.Array) -> jax.Array:
    """Of all_reduce: what a rank's term gets of the sum's cotangent.

    With types, only what the cotangent varies over is left to be summed: the sum itself does not
    vary over the group's axes, but what it was added to may.
    """
    spec = replace(spec, op=gradient_of(spec.op))
    axes = spec.group.axes
    if not spec.is_typed:
        return _move(spec, ct)
    varying = _jax_compat.varying_axes(jax.typeof(ct))
    left = tuple(a for a in axes if a in varying)
    if left == axes:
        ct = _move(spec, ct)
    elif left:
        ct = jax.lax.psum(ct, left)
    (cast,) = _jax_compat.vary_alike([ct], axes)
    return cast
