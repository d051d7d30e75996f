"""all_reduce, reduce_scatter, all_gather: add up or gather the arrays of all ranks."""

from typing import Any

import jax
import jax.numpy as jnp

from jax_ep._src.base import jax_compat
from jax_ep._src.base.errors import DTypeError, ShapeError
from jax_ep._src.base.options import AlgorithmName, BackendName, Movement
from jax_ep._src.group.group import Group
from jax_ep._src.ops.all_reduce import choice, vjp
from jax_ep._src.ops.common.checks import Checks


def all_reduce(
    x: Any,
    *,
    group: Group,
    algorithm: AlgorithmName = "auto",
    allow_psum: bool = True,
    backend: BackendName | None = None,
) -> Any:
    """Adds up arrays over the ranks of a group, on every rank: `lax.psum` over its axes.

    The sum is taken in f32 (int32 in its own type, wrapping around) in the order of the ranks,
    beginning with rank 0's element, and rounded once. Its bits are equal on every rank, for every
    size, algorithm and back end. `psum` does not promise that: XLA chooses its order.

    Args:
      x: an array or a Python number, or a pytree of them, of any shape. bf16, f16, f32, int32;
        other dtypes go by psum. Each array is a call of its own. A number gives its multiple, which
        is known while tracing, as with psum.
      group: the ranks.
      algorithm: transport of arrays between GPUs. "low_latency": each rank writes its array to
        every peer in stores of 16 bytes that are their own signals; up to 4 MiB divided by the
        number of ranks. "one_shot": each rank writes its array to every peer without flags between
        the data, up to 4 MiB, less for more than 4 ranks; every rank reads larger arrays in place.
        "two_shot": each rank adds up one part and passes its sum on; it writes up to 8 MiB (2
        ranks: 4, 3 ranks: 6) to its peers, and larger arrays are read in place. "psum": XLA's
        collective. "auto": chosen by a table that was measured for two H100 or H200; for other
        devices by thresholds that were not measured. `python -m jax_ep tune --out FILE` measures
        them; set JAX_EP_TUNING to the file before the group opens. On CPUs all algorithms but
        "psum" are the same.
      allow_psum: whether "auto" may choose psum: for arrays that it is faster for, for other
        dtypes, for empty arrays, and on the back end `xla`. False: one of jax_ep's algorithms, or
        an error.
      backend: None (the group's), "cpu", "cuda" (GPU groups) or "xla".

    Returns:
      Arrays of the same shapes and dtypes (bool becomes int32, as with psum). They no longer vary
      over the group's axes.

    Collective: yes.
    Gradient: as with `lax.psum`, with check_vma on and off.
    Raises: ConfigError, DTypeError, GroupError while tracing; PeerTimeoutError, GroupError from
      `group.check()`.
    Source: the all-reduce of TensorRT-LLM and of SGLang (2025), whose data is its own signal, for
      low_latency; vLLM's custom all-reduce (2024) for the one-shot and the two-shot. These read and
      write XLA's buffers, without registration.
    """
    check = Checks("all_reduce")
    check.group(group)

    def reduce(leaf: Any) -> Any:
        if isinstance(leaf, (int, float, complex)):
            return jax.lax.psum(leaf, group.axes)  # known while tracing
        array = _array(check, leaf)
        spec = choice.make_spec(
            check,
            group,
            array,
            array.nbytes,
            algorithm=algorithm,
            allow_psum=allow_psum,
            backend=backend,
        )
        (array,) = jax_compat.vary_alike([array], spec.group.axes)
        return vjp.move(spec, array)

    return jax.tree.map(reduce, x)


def reduce_scatter(
    x: Any,
    *,
    group: Group,
    tiled: bool = False,
    algorithm: AlgorithmName = "auto",
    allow_psum: bool = True,
    backend: BackendName | None = None,
) -> Any:
    """Returns this rank's part of the sum over the ranks: `lax.psum_scatter` over the group's axes.

    Args:
      x: [num_ranks, ...]; tiled: [num_ranks * n, ...]; or a pytree of such arrays. Part r goes to
        rank r. Numerics and dtypes as in `all_reduce`.
      group: the ranks.
      tiled: whether the parts are joined along the first axis; False: the parts have an axis of
        their own.
      algorithm: as in `all_reduce`, by the bytes of one part; there is no two-shot.
      allow_psum: whether "auto" may choose `lax.psum_scatter`, as in `all_reduce`.
      backend: as in `all_reduce`.

    Returns:
      [...]; tiled: [n, ...].

    Collective: yes.
    Gradient: the all_gather of the cotangent.
    Raises: ShapeError; as in `all_reduce`.
    Source: as in `all_reduce`.
    """
    check = Checks("reduce_scatter")
    num_ranks = check.group(group).num_ranks

    def scatter(leaf: Any) -> jax.Array:
        parts = _parts(_array(check, leaf), num_ranks, tiled=tiled)
        spec = choice.make_spec(
            check,
            group,
            parts,
            parts.nbytes // num_ranks,
            algorithm=algorithm,
            allow_psum=allow_psum,
            backend=backend,
            movement=Movement.REDUCE_SCATTER,
        )
        (parts,) = jax_compat.vary_alike([parts], spec.group.axes)
        return vjp.move(spec, parts)

    return jax.tree.map(scatter, x)


def _parts(array: jax.Array, num_ranks: int, *, tiled: bool) -> jax.Array:
    """Returns [num_ranks, ...], one part for each rank."""
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
    algorithm: AlgorithmName = "auto",
    allow_psum: bool = True,
    backend: BackendName | None = None,
) -> Any:
    """Gathers the arrays of all ranks on every rank: `lax.all_gather` over the group's axes.

    Args:
      x: [...], or a pytree of such arrays. Any dtype of whole bytes, and keys of `jax.random.key`;
        other dtypes go by `lax.all_gather`.
      group: the ranks.
      tiled: whether the arrays are joined along the first axis; False: along a new axis.
      algorithm: as in `all_reduce`, by the bytes of one rank; there is no two-shot.
      allow_psum: whether "auto" may choose `lax.all_gather`, as in `all_reduce`.
      backend: as in `all_reduce`.

    Returns:
      [num_ranks, ...]; tiled: [num_ranks * n, ...] of [n, ...].

    Collective: yes.
    Gradient: the reduce_scatter of the cotangent; for dtypes that it does not take,
      `lax.psum_scatter`.
    Raises: ShapeError; as in `all_reduce`.
    Source: as in `all_reduce`.
    """
    check = Checks("all_gather")
    check.group(group)

    def gather(leaf: Any) -> jax.Array:
        array = leaf if _is_key(leaf) else _array(check, leaf)
        if tiled and array.ndim == 0:
            raise ShapeError(f"{check.op}: with tiled=True, x must have an axis, got shape ()")
        if _is_key(array):
            words = gather(jax.random.key_data(array))
            return jax.random.wrap_key_data(words, impl=jax.random.key_impl(array))
        spec = choice.make_spec(
            check,
            group,
            array,
            array.nbytes,
            algorithm=algorithm,
            allow_psum=allow_psum,
            backend=backend,
            # XLA packs dtypes that are not whole bytes as it likes.
            dtypes=None if _is_whole_bytes(array.dtype) else choice.SUM_DTYPES,
            movement=Movement.ALL_GATHER,
        )
        (array,) = jax_compat.vary_alike([array], spec.group.axes)
        gathered = vjp.move(spec, array)
        num_ranks = spec.group.num_ranks
        whole = (num_ranks * array.shape[0], *array.shape[1:]) if tiled else gathered.shape
        return gathered.reshape(whole)

    return jax.tree.map(gather, x)


def _array(check: Checks, leaf: Any) -> jax.Array:
    if not isinstance(leaf, (int, float, complex)):
        leaf = check.array(leaf, name="x")
    if _is_key(leaf):
        raise DTypeError(f"{check.op}: x must be numbers, got random keys, {leaf.dtype.name}")
    # Without this conversion the result would have a weak type on some back ends only.
    return jax.lax.convert_element_type(leaf, jnp.asarray(leaf).dtype)


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _is_whole_bytes(dtype: Any) -> bool:
    whole: bool = jax.dtypes.itemsize_bits(dtype) % 8 == 0
    return whole
