"""Expert-parallel communication for JAX: dispatch and combine as custom calls."""

from jax_ep._src.base import native_modules as _native_modules
from jax_ep._src.base.errors import (
    ConfigError,
    DTypeError,
    GroupError,
    GroupInterruptedError,
    JaxEpError,
    PeerTimeoutError,
    ProgramError,
    RoutingError,
    ShapeError,
)
from jax_ep._src.base.handle import Dispatched, DispatchHandle, InFlight
from jax_ep._src.base.overlap import overlap
from jax_ep._src.base.policies import export_safety_checks, save_communication_policy
from jax_ep._src.group.group import Group
from jax_ep._src.group.info import GroupInfo
from jax_ep._src.ops.all_reduce.api import all_gather, all_reduce, reduce_scatter
from jax_ep._src.ops.all_reduce_residual_rmsnorm.api import all_reduce_residual_rmsnorm
from jax_ep._src.ops.combine.api import combine, combine_weights
from jax_ep._src.ops.combine.api_halves import (
    low_latency_combine_recv,
    low_latency_combine_send,
)
from jax_ep._src.ops.combine.api_low_latency import low_latency_combine
from jax_ep._src.ops.dispatch.api import dispatch
from jax_ep._src.ops.dispatch.api_fp8 import dispatch_fp8
from jax_ep._src.ops.dispatch.api_halves import (
    low_latency_dispatch_recv,
    low_latency_dispatch_send,
)
from jax_ep._src.ops.dispatch.api_low_latency import low_latency_dispatch
from jax_ep._src.ops.dispatch.capacity import recv_capacity
from jax_ep._src.ops.dispatch.fp8 import dequantize_fp8, quantize_fp8
from jax_ep._src.ops.dispatch.low_latency_bytes import in_flight_bytes, low_latency_bytes
from jax_ep._src.ops.get_dispatch_layout.api import DispatchLayout, get_dispatch_layout
from jax_ep._src.ops.ragged_all_to_all.api import ragged_all_to_all
from jax_ep._src.ops.ragged_all_to_all.api_all_to_all_v import AllToAllV, all_to_all_v

__version__ = "0.1.0"

__all__ = [
    "AllToAllV",
    "ConfigError",
    "DTypeError",
    "DispatchHandle",
    "DispatchLayout",
    "Dispatched",
    "Group",
    "GroupError",
    "GroupInfo",
    "GroupInterruptedError",
    "InFlight",
    "JaxEpError",
    "PeerTimeoutError",
    "ProgramError",
    "RoutingError",
    "ShapeError",
    "all_gather",
    "all_reduce",
    "all_reduce_residual_rmsnorm",
    "all_to_all_v",
    "combine",
    "combine_weights",
    "dequantize_fp8",
    "dispatch",
    "dispatch_fp8",
    "export_safety_checks",
    "get_dispatch_layout",
    "in_flight_bytes",
    "low_latency_bytes",
    "low_latency_combine",
    "low_latency_combine_recv",
    "low_latency_combine_send",
    "low_latency_dispatch",
    "low_latency_dispatch_recv",
    "low_latency_dispatch_send",
    "overlap",
    "quantize_fp8",
    "ragged_all_to_all",
    "recv_capacity",
    "reduce_scatter",
    "save_communication_policy",
]

# Pickles, tracebacks and help() name what users import, wherever it is defined.
for _name in __all__:
    globals()[_name].__module__ = __name__
del _name

_native_modules.register_early()
