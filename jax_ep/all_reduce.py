"""all_reduce, reduce_scatter, all_gather: arrays of all ranks, added up or side by side."""

from typing import Any

import jax
import jax.numpy as jnp

from jax_ep import _checks, _jax_compat, _reduce
from jax_ep.config import Movement
from jax_ep.errors import DTypeError, ShapeError
from jax_ep.group import Group


def all_reduce(
    x: Any,
    *,
    group: Group,
    algorithm: str = "auto",
    allow_psum: bool = True,
    backend: str | None = None,
) -> Any:
    """The sum over the ranks of a group, on every rank: `lax.psum` over its axes.

    The sum is taken in f32 (int32 in its own type, wrapping around) in the order of the ranks,
    beginning with rank 0's element, and rounded once: its bits are the same on every rank, for
    every size, algorithm and back end. Where psum takes over, that ends: its order is XLA's.

    Args:
      x: an array or a Python number, or a pytree of them, of any shape. bf16, f16, f32, int32;
        others by psum. Each array is a call of its own; a number comes back as a multiple of it
        that is known while tracing, as of psum.
      group: the ranks.
      algorithm: how the arrays travel between GPUs. "low_latency": every rank stores its array
        at every other, each 12 bytes with a flag; up to 3 MiB over the number of ranks.
        "one_shot": the same without flags in the words, up to 4 MiB, less for more than 4 ranks;
        larger arrays every rank reads where they lie. "two_shot": every rank adds a part and
        passes it on; stored up to 8 MiB (2 ranks: 4, 3: 6), read where it lies beyond. "psum": the
        stock collective. "auto": by a table, measured for two H100 or H200; else by thresholds that
        were not, until `python -m jax_ep tune --out FILE` has measured them and JAX_EP_TUNING
        names the file when the group opens. On CPUs all of ours are the same.
      allow_psum: whether "auto" may choose psum: for arrays that it is faster for, for other
        dtypes, for empty arrays, and on the back end `xla`. False: those of ours only, or an error.
      backend: None (the group's), "cpu", "cuda" (GPU groups) or "xla".

    Returns:
      Arrays of the same shapes and dtypes (bool: int32, as psum), that vary over the group's axes
      no longer.

    Collective: yes.
    Gradient: that of `lax.psum`, with check_vma on and off.
    Raises: ConfigError, DTypeError, GroupError while tracing; PeerTimeoutError, GroupError from
      `group.check()`.
    Source: NCCL's LL protocol (NVIDIA, 2017) for low_latency; vLLM's custom all-reduce (2024) for
      the one-shot and the two-shot. These read and write XLA's buffers, without registration.
    """
    _checks.require_group(group, op="all_reduce")

    def reduce(leaf: Any) -> Any:
        if isinstance(leaf, (int, float, complex)):
            return jax.lax.psum(leaf, group.axes)  # known while tracing
        array = _array(leaf, op="all_reduce")
        spec = _reduce.make_spec(
            group,
            array,
            array.nbytes,
            op="all_reduce",
            algorithm=algorithm,
            allow_psum=allow_psum,
            backend=backend,
        )
        (array,) = _jax_compat.vary_alike([array], spec.group.axes)
        return _reduce.move(spec, array)

    return jax.tree.map(reduce, x)


def reduce_scatter(
    x: Any,
    *,
    group: Group,
    tiled: bool = False,
    algorithm: str = "auto",
    allow_psum: bool = True,
    backend: str | None = None,
) -> Any:
    """This rank's part of the sum over the ranks: `lax.psum_scatter` over the group's axes.

    Args:
      x: [num_ranks, ...]; tiled: [num_ranks * n, ...]; or a pytree of such. Part r goes to rank r.
        Numerics and dtypes as in `all_reduce`.
      group: the ranks.
      tiled: whether the ranks' parts are one behind the other along the first axis, or along an
        axis of their own.
      algorithm: as in `all_reduce`, by the bytes of one part; there is no two-shot.
      allow_psum: whether "auto" may choose `lax.psum_scatter`, as in `all_reduce`.
      backend: as in `all_reduce`.

    Returns:
      [...]; tiled: [n, ...].

    Collective: yes.
    Gradient: all_gather of the cotangent.
    Raises: ShapeError; as in `all_reduce`.
    Source: as in `all_reduce`.
    """
    op = "reduce_scatter"
    num_ranks = _checks.require_group(group, op=op).num_ranks

    def scatter(leaf: Any) -> jax.Array:
        parts = _parts(_array(leaf, op=op), num_ranks, tiled=tiled)
        spec = _reduce.make_spec(
            group,
            parts,
            parts.nbytes // num_ranks,
            op=op,
            algorithm=algorithm,
            allow_psum=allow_psum,
            backend=backend,
            movement=Movement.REDUCE_SCATTER,
        )
        (parts,) = _jax_compat.vary_alike([parts], spec.group.axes)
        return _reduce.move(spec, parts)

    return jax.tree.map(scatter, x)


def _parts(array: jax.Array, num_ranks: int, *, tiled: bool) -> jax.Array:
    """[num_ranks, ...]: a part for each rank."""
    rest = array.shape[0] % num_ranks if tiled and array.ndim else 0
    if array.ndim == 0 or rest or not (tiled or array.shape[0] == num_ranks):
        expected = "a multiple of num_ranks" if tiled else "num_ranks"
        raise ShapeError(
            f"reduce_scatter: the first axis of x must be {expected}={num_ranks}, got shape "
            f"{array.shape}"
        )
    part = (array.shape[0] // num_ranks, *array.shape[1:])
    return array.reshape(num_ranks, *part) if tiled else array


def all_gather(
    x: Any,
    *,
    group: Group,
    tiled: bool = False,
    algorithm: str = "auto",
    allow_psum: bool = True,
    backend: str | None = None,
) -> Any:
    """The arrays of all ranks, on every rank: `lax.all_gather` over the group's axes.

    Args:
      x: [...], or a pytree of such. Any dtype of whole bytes, and keys of `jax.random.key`; others
        by `lax.all_gather`.
      group: the ranks.
      tiled: whether the ranks' arrays are put one behind the other along the first axis, or along
        a new one.
      algorithm: as in `all_reduce`, by the bytes of one rank; there is no two-shot.
      allow_psum: whether "auto" may choose `lax.all_gather`, as in `all_reduce`.
      backend: as in `all_reduce`.

    Returns:
      [num_ranks, ...]; tiled: [num_ranks * n, ...] of [n, ...].

    Collective: yes.
    Gradient: reduce_scatter of the cotangent; for dtypes that it does not take,
      `lax.psum_scatter`.
    Raises: ShapeError; as in `all_reduce`.
    Source: as in `all_reduce`.
    """
    op = "all_gather"
    _checks.require_group(group, op=op)

    def gather(leaf: Any) -> jax.Array:
        array = leaf if _is_key(leaf) else _array(leaf, op=op)
        if tiled and array.ndim == 0:
            raise ShapeError(f"{op}: tiled, x must have an axis, got shape ()")
        if _is_key(array):
            words = gather(jax.random.key_data(array))
            return jax.random.wrap_key_data(words, impl=jax.random.key_impl(array))
        spec = _reduce.make_spec(
            group,
            array,
            array.nbytes,
            op=op,
            algorithm=algorithm,
            allow_psum=allow_psum,
            backend=backend,
            # What is no whole bytes XLA packs as it likes.
            dtypes=None if _is_whole_bytes(array.dtype) else _reduce.SUM_DTYPES,
            movement=Movement.ALL_GATHER,
        )
        (array,) = _jax_compat.vary_alike([array], spec.group.axes)
        gathered = _reduce.move(spec, array)
        num_ranks = spec.group.num_ranks
        whole = (num_ranks * array.shape[0], *array.shape[1:]) if tiled else gathered.shape
        return gathered.reshape(whole)

    return jax.tree.map(gather, x)


def _array(leaf: Any, *, op: str) -> jax.Array:
    if not isinstance(leaf, (int, float, complex)):
        leaf = _checks.require_array(leaf, op=op, argument="x")
    if _is_key(leaf):
        raise DTypeError(f"{op}: x must be numbers, got random keys, {leaf.dtype.name}")
    # A weak type would stay one on some back ends only.
    return jax.lax.convert_element_type(leaf, jnp.asarray(leaf).dtype)


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _is_whole_bytes(dtype: Any) -> bool:
    whole: bool = jax.dtypes.itemsize_bits(dtype) % 8 == 0
    return whole
