"""The clock of a device, read in the middle of a compiled program, after a wait if one likes.

Measurements read it between the operations of a chain, and a rank that waits is a late rank.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_ep._src.base.errors import ConfigError
from jax_ep._src.base.jax_compat import vary_alike, varying_axes


class Reading(NamedTuple):
    """What a rank gets of one reading.

    Attributes:
      time: [2] uint32, nanoseconds at the end of the wait, the low word first.
      tick: [1] uint32, nanoseconds of the smallest step of the clock during the wait; 0: it saw
        none.
      arrays: those that were given, unchanged.
    """

    time: jax.Array
    tick: jax.Array
    arrays: Any


def read_clock(delay_us: jax.Array, arrays: Any) -> Reading:
    """Waits, then reads the clock of the device that runs it: %globaltimer, or a steady clock.

    The reading comes behind all that makes `arrays`, and in front of all that takes them from the
    result. Of two readings the second must take what the first returns: XLA may merge readings of
    the same arrays, and drops one of which nobody uses anything. Clocks of two devices differ.

    Args:
      delay_us: [1] int32, microseconds to wait, which may differ from rank to rank. A number below
        0 counts as 0, one above 1,000,000 as 1,000,000.
      arrays: pytree of one or more arrays. They stay in their memory; XLA copies one that somebody
        else reads later, or that is given twice.

    Returns:
      Reading.

    Collective: no.
    Gradient: none.
    Raises: ConfigError without arrays.
    """
    leaves, structure = jax.tree.flatten(arrays)
    if not leaves:
        raise ConfigError("read_clock: arrays must hold at least one, which puts it in its place")
    results = (
        jax.ShapeDtypeStruct((2,), jnp.uint32),
        jax.ShapeDtypeStruct((1,), jnp.uint32),
        *(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in leaves),
    )
    aliases = {1 + i: 2 + i for i in range(len(leaves))}
    call = jax.ffi.ffi_call("jax_ep.read_clock", results, input_output_aliases=aliases)
    # A custom call has invariant results unless they are cast.
    axes = frozenset().union(*(varying_axes(jax.typeof(a)) for a in (delay_us, *leaves)))
    # Behind barriers for the reason that primitive.py gives.
    read = [jax.lax.optimization_barrier(a) for a in call(delay_us, *leaves)]
    time, tick, *passed = vary_alike(read, sorted(axes))
    return Reading(time, tick, jax.tree.unflatten(structure, passed))


def nanoseconds(time: Any) -> np.ndarray[Any, Any]:
    """Returns [...] uint64 for the words [..., 2] of readings."""
    words = np.asarray(time).astype(np.uint64)
    whole: np.ndarray[Any, Any] = words[..., 0] | words[..., 1] << np.uint64(32)
    return whole
