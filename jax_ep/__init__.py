"""Expert-parallel communication for JAX: dispatch and combine as custom calls."""

from jax_ep import _native
from jax_ep.all_reduce import all_gather as all_gather
from jax_ep.all_reduce import all_reduce as all_reduce
from jax_ep.all_reduce import reduce_scatter as reduce_scatter
from jax_ep.all_reduce_residual_rmsnorm import (
    all_reduce_residual_rmsnorm as all_reduce_residual_rmsnorm,
)
from jax_ep.beside import beside as beside
from jax_ep.capacity import recv_capacity as recv_capacity
from jax_ep.combine import combine as combine
from jax_ep.combine import combine_weights as combine_weights
from jax_ep.dispatch import dispatch as dispatch
from jax_ep.dispatch_fp8 import dispatch_fp8 as dispatch_fp8
from jax_ep.errors import ConfigError as ConfigError
from jax_ep.errors import DTypeError as DTypeError
from jax_ep.errors import GroupError as GroupError
from jax_ep.errors import GroupInterruptedError as GroupInterruptedError
from jax_ep.errors import JaxEpError as JaxEpError
from jax_ep.errors import PeerTimeoutError as PeerTimeoutError
from jax_ep.errors import ProgramError as ProgramError
from jax_ep.errors import RoutingError as RoutingError
from jax_ep.errors import ShapeError as ShapeError
from jax_ep.fp8 import dequantize_fp8 as dequantize_fp8
from jax_ep.fp8 import quantize_fp8 as quantize_fp8
from jax_ep.get_dispatch_layout import DispatchLayout as DispatchLayout
from jax_ep.get_dispatch_layout import get_dispatch_layout as get_dispatch_layout
from jax_ep.group import Group as Group
from jax_ep.group import GroupInfo as GroupInfo
from jax_ep.handle import Dispatched as Dispatched
from jax_ep.handle import DispatchHandle as DispatchHandle
from jax_ep.transforms import export_safety_checks as export_safety_checks
from jax_ep.transforms import save_communication_policy as save_communication_policy

__version__ = "0.1.0"

_native.register_early()
