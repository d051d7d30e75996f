"""Checks that several operations share. Each message: operation, argument, expected, got."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jax_ep import _jax_compat, _registry, config
from jax_ep._spec import Route, Routes
from jax_ep.config import Layout
from jax_ep.errors import ConfigError, DTypeError, GroupError, ShapeError
from jax_ep.group import Group
from jax_ep.handle import DispatchHandle

FLOAT_DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)


def require_group(group: Any, *, op: str) -> Group:
    """The group, ready to be traced with."""
    if group is None:
        raise GroupError(f"{op}: group is missing: pass an open jax_ep.Group as group=")
    if not isinstance(group, Group):
        raise GroupError(f"{op}: group must be a jax_ep.Group, got {type(group).__name__}")
    group.require_traceable(op)
    return group


def require_positive_number(value: Any, *, op: str, argument: str, or_zero: bool = False) -> float:
    """A static, finite number of Python's or NumPy's; `or_zero`: zero will do."""
    number = config.to_number(value)
    is_in_range = 0 < number < math.inf or (or_zero and number == 0)
    if not is_in_range:
        kind = "number of at least 0" if or_zero else "positive number"
        raise ConfigError(f"{op}: {argument} must be a static {kind}, got {value!r}")
    return number


def require_array(x: Any, *, op: str, argument: str) -> Any:
    """An array of JAX or NumPy, as it is: conversion could narrow it before it is checked.

    One in host memory (an offloaded residual) comes back on the device.
    """
    if x is None:
        raise DTypeError(f"{op}: {argument} is missing: it must be an array")
    if not hasattr(x, "shape") or not hasattr(x, "dtype"):
        raise DTypeError(f"{op}: {argument} must be an array, got {type(x).__name__}")
    return _jax_compat.on_device_memory(x) if isinstance(x, jax.Array) else x


def require_shape(x: jax.Array, shape: Sequence[int], *, op: str, argument: str) -> None:
    """The exact shape."""
    if x.shape != tuple(shape):
        raise ShapeError(f"{op}: {argument} must have shape {tuple(shape)}, got {x.shape}")


def require_dtype(x: jax.Array, dtypes: Sequence[Any], *, op: str, argument: str) -> None:
    """One of the dtypes."""
    if x.dtype not in [jnp.dtype(d) for d in dtypes]:
        names = config.alternatives(list(dict.fromkeys(jnp.dtype(d).name for d in dtypes)))
        raise DTypeError(f"{op}: {argument} must be {names}, got {x.dtype.name}")


def require_rows(
    value: Any,
    *,
    op: str,
    argument: str,
    rows: str = "num_tokens",
    dtypes: Sequence[Any] = FLOAT_DTYPES,
) -> jax.Array:
    """[rows, hidden] of one of the dtypes, a row being a multiple of 16 bytes.

    `rows`: what their number is called.
    """
    x = require_array(value, op=op, argument=argument)
    if x.ndim != 2 or 0 in x.shape:
        raise ShapeError(
            f"{op}: {argument} must be [{rows}, hidden], both positive, got shape {x.shape}"
        )
    require_dtype(x, dtypes, op=op, argument=argument)
    row_bytes = x.shape[1] * x.dtype.itemsize
    if row_bytes % config.ROW_BYTES_MULTIPLE:
        raise ShapeError(
            f"{op}: a row of {argument} must be a multiple of {config.ROW_BYTES_MULTIPLE} bytes, "
            f"got hidden={x.shape[1]} of {x.dtype.name}: {row_bytes} bytes"
        )
    return jnp.asarray(x)


def require_stream(
    value: Any, num_tokens: int, *, op: str, argument: str, dtypes: Sequence[Any] | None = None
) -> jax.Array:
    """[num_tokens, anything], of whole bytes: it is moved, not computed with."""
    x = require_array(value, op=op, argument=argument)
    if dtypes is not None:
        require_dtype(x, dtypes, op=op, argument=argument)
    if x.ndim != 2 or x.shape[0] != num_tokens or x.shape[1] < 1:
        raise ShapeError(
            f"{op}: {argument} must be [num_tokens={num_tokens}, at least 1], got shape {x.shape}"
        )
    if jnp.issubdtype(x.dtype, jax.dtypes.extended) or jax.dtypes.itemsize_bits(x.dtype) % 8:
        raise DTypeError(f"{op}: rows of {argument} must be whole bytes; pack {x.dtype} into uint8")
    return jnp.asarray(x)


def require_blocks(x: jax.Array, block: Any, *, op: str) -> int:
    """The block, of which x [num_tokens, hidden] has whole ones in every row."""
    size = config.require_int(block, minimum=1, op=op, argument="block")
    if x.ndim != 2 or x.shape[1] < 1 or x.shape[1] % size:
        raise ShapeError(
            f"{op}: x must be [num_tokens, hidden], hidden a positive multiple of block={size}, "
            f"got shape {x.shape}"
        )
    return size


def require_handle(handle: Any, *, op: str) -> Group:
    """The group of a handle that fits it, ready to be traced with."""
    if not isinstance(handle, DispatchHandle):
        raise ConfigError(
            f"{op}: handle must be the DispatchHandle of a dispatch, got {type(handle).__name__}"
        )
    group = require_group(_registry.find_group(handle.group, op=op), op=op)
    config.choice(config.Layout, handle.layout, op=op, argument="handle.layout")
    _require_whole(handle, group.num_ranks, op=op)
    return group


def _require_whole(handle: DispatchHandle, num_ranks: int, *, op: str) -> None:
    """A handle built by hand, or half of one, is told here rather than by a wrong result."""
    arrays = {"recv_src": handle.recv_src, "send_row": handle.send_row}
    by_choice = {"recv_k": handle.recv_k, "send_rank": handle.send_rank}
    is_rank_layout = handle.layout == "rank"
    columns = handle.send_row.shape[1] if handle.send_row.ndim == 2 else 0
    if any((a is None) != is_rank_layout for a in by_choice.values()) or (
        is_rank_layout and columns != num_ranks
    ):
        raise GroupError(
            f"{op}: the handle's arrays do not fit its layout={handle.layout!r} and "
            f"num_ranks={num_ranks}: send_row has shape {handle.send_row.shape}"
        )
    at_rows, at_tokens = (handle.recv_capacity,), (handle.send_row.shape[0], columns)
    shapes = {"recv_src": at_rows, "recv_k": at_rows, "send_row": at_tokens, "send_rank": at_tokens}
    for name, array in (arrays | by_choice).items():
        if array is not None:
            require_shape(array, shapes[name], op=op, argument=f"handle.{name}")
            require_dtype(array, (jnp.int32,), op=op, argument=f"handle.{name}")


def require_topk_idx(value: Any, *, num_experts: int, op: str) -> jax.Array:
    """[num_tokens, num_topk] int32. Wider ids that do not fit stay invalid."""
    topk_idx = require_array(value, op=op, argument="topk_idx")
    if topk_idx.ndim != 2 or 0 in topk_idx.shape:
        raise ShapeError(
            f"{op}: topk_idx must be [num_tokens, num_topk], both positive, "
            f"got shape {topk_idx.shape}"
        )
    require_dtype(topk_idx, (jnp.int32, jnp.int64), op=op, argument="topk_idx")
    # Clipped as what they are: ids that do not fit into int32 stay invalid.
    return jnp.asarray(topk_idx.clip(-2, num_experts).astype(jnp.int32))


def require_num_experts(num_experts: Any, group: Group, *, op: str) -> int:
    """A positive multiple of the group's ranks."""
    if num_experts is None:
        raise ConfigError(f"{op}: num_experts is missing: it must be a static integer")
    number = config.require_int(num_experts, minimum=1, op=op, argument="num_experts")
    if number % group.num_ranks:
        raise ConfigError(
            f"{op}: num_experts must be a multiple of num_ranks={group.num_ranks}, got {number}"
        )
    return number


def require_backend(backend: str | None, group: Group, *, op: str) -> str:
    """The back end of this call: the group's, or another one that works for the group."""
    if backend is None or backend == group.backend:
        return group.backend
    if backend not in group.backends:
        names = ", ".join(repr(b) for b in config.BACKENDS)
        raise ConfigError(f"{op}: backend must be one of {names} or None, got {backend!r}")
    if op not in group.backends[backend].ops:
        reason = group.backends[backend].reason
        raise GroupError(f"{op}: backend {backend!r} is not usable here: {reason}")
    return backend


def require_routes(
    backend: str | None, num_sms: int | None, group: Group, layout: Layout, *, op: str
) -> Routes:
    """The routes of this call and its gradient: the group's, or as the caller says."""
    wanted = require_backend(backend, group, op=op)
    if num_sms is not None:
        num_sms = config.require_int(num_sms, minimum=1, op=op, argument="num_sms")
    budgets = [group.budgets.of[exchange][layout] for exchange in Routes._fields]
    if backend is None and num_sms is None:
        return Routes(*(Route(budget.backend or wanted, budget.sms) for budget in budgets))
    return Routes(*(Route(wanted, num_sms or budget.sms) for budget in budgets))


def report_bad_routing(topk_idx: jax.Array, *, num_experts: int, group: Group, op: str) -> None:
    """Debug mode: has the group record ids that are no experts, and experts named twice."""
    if not group.debug:
        return
    is_expert = (topk_idx >= 0) & (topk_idx < num_experts)
    num_invalid = jnp.sum((topk_idx != -1) & ~is_expert)
    repeated = topk_idx[:, :, None] == topk_idx[:, None, :]
    earlier = jnp.tri(topk_idx.shape[1], k=-1, dtype=jnp.bool_)[None]
    num_repeated = jnp.sum(repeated & earlier & is_expert[:, :, None])
    rank = jax.lax.axis_index(group.axes)

    def report(*found: Any) -> None:
        group.report_bad_routing(op, *found)

    jax.debug.callback(report, rank, num_invalid, num_repeated)
