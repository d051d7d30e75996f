"""Checks of an operation's arguments. Each message: operation, argument, expected, got."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jax_ep._src.base import config, jax_compat, registry
from jax_ep._src.base.checks import StaticChecks, alternatives
from jax_ep._src.base.errors import ConfigError, DTypeError, GroupError, ShapeError
from jax_ep._src.base.handle import DispatchHandle
from jax_ep._src.base.options import ExchangeMode, Layout
from jax_ep._src.base.spec import Route, Routes
from jax_ep._src.group.group import Group

FLOAT_DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)
WEIGHT_DTYPES = (*FLOAT_DTYPES, jnp.float64)


class Checks(StaticChecks):
    """The checks of one public operation. `name` is the name of an argument."""

    # --- arrays

    def array(self, x: Any, *, name: str) -> Any:
        """Returns an array of JAX or NumPy as it is: a conversion could narrow it before its check.

        An array in host memory (an offloaded residual) is copied to the device.
        """
        if x is None:
            raise DTypeError(f"{self.op}: {name} is missing: it must be an array")
        if not hasattr(x, "shape") or not hasattr(x, "dtype"):
            raise DTypeError(f"{self.op}: {name} must be an array, got {type(x).__name__}")
        return jax_compat.on_device_memory(x) if isinstance(x, jax.Array) else x

    def shape(self, x: jax.Array, shape: Sequence[int], *, name: str) -> None:
        """Raises ShapeError unless `x` has this exact shape."""
        if x.shape != tuple(shape):
            raise ShapeError(f"{self.op}: {name} must have shape {tuple(shape)}, got {x.shape}")

    def dtype(self, x: jax.Array, dtypes: Sequence[Any], *, name: str) -> None:
        """Raises DTypeError unless `x` has one of the dtypes."""
        if x.dtype not in [jnp.dtype(d) for d in dtypes]:
            names = alternatives(list(dict.fromkeys(jnp.dtype(d).name for d in dtypes)))
            raise DTypeError(f"{self.op}: {name} must be {names}, got {x.dtype.name}")

    def rows(
        self,
        value: Any,
        *,
        name: str,
        count: str = "num_tokens",
        dtypes: Sequence[Any] = FLOAT_DTYPES,
    ) -> jax.Array:
        """Returns [count, hidden] of one of the dtypes, whose rows are multiples of 16 bytes."""
        x = self.array(value, name=name)
        if x.ndim != 2 or 0 in x.shape:
            raise ShapeError(
                f"{self.op}: {name} must be [{count}, hidden], both positive, got shape {x.shape}"
            )
        self.dtype(x, dtypes, name=name)
        row_bytes = x.shape[1] * x.dtype.itemsize
        if row_bytes % config.ROW_BYTES_MULTIPLE:
            raise ShapeError(
                f"{self.op}: a row of {name} must be a multiple of {config.ROW_BYTES_MULTIPLE} "
                f"bytes, got hidden={x.shape[1]} of {x.dtype.name}: {row_bytes} bytes"
            )
        return jnp.asarray(x)

    def stream(
        self, value: Any, num_tokens: int, *, name: str, dtypes: Sequence[Any] | None = None
    ) -> jax.Array:
        """Returns [num_tokens, P] of a dtype of whole bytes; the array is moved, not computed with.

        `dtypes`: the only dtypes allowed; None: any.
        """
        x = self.array(value, name=name)
        if dtypes is not None:
            self.dtype(x, dtypes, name=name)
        if x.ndim != 2 or x.shape[0] != num_tokens or x.shape[1] < 1:
            raise ShapeError(
                f"{self.op}: {name} must be [num_tokens={num_tokens}, width] with width positive, "
                f"got shape {x.shape}"
            )
        is_extended = jnp.issubdtype(x.dtype, jax.dtypes.extended)
        if is_extended or jax.dtypes.itemsize_bits(x.dtype) % 8:
            raise DTypeError(
                f"{self.op}: rows of {name} must be whole bytes; pack {x.dtype} into uint8"
            )
        return jnp.asarray(x)

    def weights(self, value: Any, *, name: str) -> jax.Array:
        """Returns weights of any floating dtype as f32. Their gradient has their own dtype."""
        x = self.array(value, name=name)
        self.dtype(x, WEIGHT_DTYPES, name=name)
        return jnp.asarray(x).astype(jnp.float32)

    def blocks(self, x: jax.Array, block: Any) -> int:
        """Returns the block size; every row of x [num_tokens, hidden] must hold whole blocks."""
        size = self.integer(block, minimum=1, name="block")
        if x.ndim != 2 or x.shape[1] < 1 or x.shape[1] % size:
            raise ShapeError(
                f"{self.op}: x must be [num_tokens, hidden] with hidden a positive multiple of "
                f"block={size}, got shape {x.shape}"
            )
        return size

    # --- groups and routes

    def group(self, group: Any) -> Group:
        """Returns the group, after a check that the operation can be traced with it here."""
        if group is None:
            raise GroupError(f"{self.op}: group is missing: pass an open jax_ep.Group as group=")
        if not isinstance(group, Group):
            raise GroupError(f"{self.op}: group must be a jax_ep.Group, got {type(group).__name__}")
        group.require_traceable(self.op)
        return group

    def backend(self, backend: str | None, group: Group) -> str:
        """Returns the back end of this call: the group's, or a named one that works for it.

        Custom calls inside the nodes of a group do not carry every operation; XLA does.
        """
        if backend is None:
            return group.backend if self.op in group.backends[group.backend].ops else "xla"
        if backend not in group.backends:
            names = ", ".join(repr(b) for b in config.BACKENDS)
            raise ConfigError(f"{self.op}: backend must be one of {names} or None, got {backend!r}")
        usability = group.backends[backend]
        if self.op not in usability.ops:
            raise GroupError(
                f"{self.op}: backend {backend!r} is not usable here: {usability.reason}"
            )
        return backend

    def routes(
        self,
        backend: str | None,
        num_sms: int | None,
        group: Group,
        layout: Layout,
        mode: ExchangeMode | None = None,
    ) -> Routes:
        """Returns the routes of this call and its gradient: the group's, or the caller's choice.

        The budgets, measured with many tokens, say nothing about the back end of few.
        """
        wanted = self.backend(backend, group)
        if num_sms is not None:
            num_sms = self.integer(num_sms, minimum=1, name="num_sms")
        budgets = [group.budgets.of[exchange][layout] for exchange in Routes._fields]
        if backend is None and num_sms is None and mode is not ExchangeMode.LOW_LATENCY:
            return Routes(*(Route(budget.backend or wanted, budget.sms) for budget in budgets))
        return Routes(*(Route(wanted, num_sms or budget.sms) for budget in budgets))

    def plain_mode(self, num_sms: int | None, group: Group) -> ExchangeMode | None:
        """Returns the mode of an exchange that is not named low-latency, as in ExchangeSpec.

        A number of SMs asks for the kernels that get along with few.
        """
        is_free = num_sms is None and group.num_sms is None
        return None if is_free else ExchangeMode.THROUGHPUT

    # --- routings

    def rank_mask(self, value: Any, group: Group) -> jax.Array | None:
        """Returns [num_ranks] bool, whether each rank takes part; None: all do."""
        if value is None:
            return None
        mask = self.array(value, name="rank_mask")
        self.shape(mask, (group.num_ranks,), name="rank_mask")
        self.dtype(mask, (jnp.bool_,), name="rank_mask")
        return jnp.asarray(mask)

    def topk_idx(self, value: Any, *, num_experts: int) -> jax.Array:
        """Returns [num_tokens, num_topk] int32. Wider ids that do not fit stay invalid."""
        topk_idx = self.array(value, name="topk_idx")
        if topk_idx.ndim != 2 or 0 in topk_idx.shape:
            raise ShapeError(
                f"{self.op}: topk_idx must be [num_tokens, num_topk], both positive, "
                f"got shape {topk_idx.shape}"
            )
        self.dtype(topk_idx, (jnp.int32, jnp.int64), name="topk_idx")
        # Ids are clipped before they are narrowed, so ids that do not fit into int32 stay invalid.
        return jnp.asarray(topk_idx.clip(-2, num_experts).astype(jnp.int32))

    def num_experts(self, value: Any, group: Group) -> int:
        """Returns the number of experts, a positive multiple of the group's ranks."""
        if value is None:
            raise ConfigError(f"{self.op}: num_experts is missing: it must be a static integer")
        number = self.integer(value, minimum=1, name="num_experts")
        if number % group.num_ranks:
            raise ConfigError(
                f"{self.op}: num_experts must be a multiple of num_ranks={group.num_ranks}, "
                f"got {number}"
            )
        return number

    def handle(self, handle: Any, *, may_leave_out: bool = False) -> tuple[Group, Layout]:
        """Returns the group and the layout of a handle, after a check that its arrays fit them.

        `may_leave_out`: whether the operation takes handles that leave ranks out.
        """
        if not isinstance(handle, DispatchHandle):
            raise ConfigError(
                f"{self.op}: handle must be the DispatchHandle of a dispatch, "
                f"got {type(handle).__name__}"
            )
        if handle.rank_mask is not None and not may_leave_out:
            raise ConfigError(
                f"{self.op}: the handle is of a dispatch with rank_mask; only low_latency_combine "
                "takes it, since other operations need all ranks"
            )
        group = self.group(registry.find_group(handle.group, op=self.op))
        layout = self.choice(Layout, handle.layout, name="handle.layout")
        self._whole(handle, layout, group.num_ranks)
        return group, layout

    def _whole(self, handle: DispatchHandle, layout: Layout, num_ranks: int) -> None:
        """Raises an error for a handle built by hand whose arrays do not fit together."""
        arrays = {"recv_src": handle.recv_src, "send_row": handle.send_row}
        by_choice = {"recv_k": handle.recv_k, "send_rank": handle.send_rank}
        is_rank_layout = layout is Layout.RANK
        columns = handle.send_row.shape[1] if handle.send_row.ndim == 2 else 0
        if any((a is None) != is_rank_layout for a in by_choice.values()) or (
            is_rank_layout and columns != num_ranks
        ):
            raise GroupError(
                f"{self.op}: the handle's arrays do not fit its layout={layout.value!r} and "
                f"num_ranks={num_ranks}: send_row has shape {handle.send_row.shape}"
            )
        rows, tokens = (handle.recv_capacity,), (handle.send_row.shape[0], columns)
        shapes = {"recv_src": rows, "recv_k": rows, "send_row": tokens, "send_rank": tokens}
        for name, array in (arrays | by_choice).items():
            if array is not None:
                self.shape(array, shapes[name], name=f"handle.{name}")
                self.dtype(array, (jnp.int32,), name=f"handle.{name}")
        if handle.rank_mask is not None:
            self.shape(handle.rank_mask, (num_ranks,), name="handle.rank_mask")
            self.dtype(handle.rank_mask, (jnp.bool_,), name="handle.rank_mask")

    def report_bad_routing(self, topk_idx: jax.Array, *, num_experts: int, group: Group) -> None:
        """Makes the group record invalid ids and repeated experts, in debug mode only."""
        if not group.debug:
            return
        is_expert = (topk_idx >= 0) & (topk_idx < num_experts)
        num_invalid = jnp.sum((topk_idx != -1) & ~is_expert)
        repeated = topk_idx[:, :, None] == topk_idx[:, None, :]
        earlier = jnp.tri(topk_idx.shape[1], k=-1, dtype=jnp.bool_)[None]
        num_repeated = jnp.sum(repeated & earlier & is_expert[:, :, None])
        rank = jax.lax.axis_index(group.axes)

        def report(*found: Any) -> None:
            group.report_bad_routing(self.op, *found)

        jax.debug.callback(report, rank, num_invalid, num_repeated)
