"""Names of JAX that are private, or differ between the supported versions (0.10.2 to 0.12).

No other module of the package imports jax._src, jax.extend or jax.interpreters.
"""

import ctypes
import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple, ParamSpec, TypeVar

import jax
from jax._src import core, dispatch, distributed, sharding_impls, xla_bridge
from jax._src import mesh as mesh_internals
from jax._src.interpreters import mlir as mlir_internals
from jax.experimental import compute_on as compute_on_module
from jax.extend.core import Primitive
from jax.extend.mlir.dialects import stablehlo
from jax.interpreters import ad, batching, mlir
from jaxlib import xla_client

P = ParamSpec("P")
T = TypeVar("T")

__all__ = [
    "Primitive",
    "abandon_runtime",
    "ad",
    "ambient_meshes",
    "batching",
    "behind_barriers",
    "can_register_types",
    "clean_context",
    "default_heartbeat_timeout",
    "distributed_client",
    "excuse_effects",
    "has_backends",
    "is_gone",
    "is_ready",
    "lowering_mesh",
    "manual_axes",
    "mlir",
    "number_in_program",
    "on_device_memory",
    "on_second_stream",
    "plain_array",
    "result_aval",
    "vary_alike",
    "varying_axes",
    "wait_for_effects",
    "when_plugins_begin",
]


def has_backends() -> bool:
    """Returns whether JAX has made its backends; it then has read its environment."""
    return bool(xla_bridge.backends_are_initialized())


def behind_barriers(values: Sequence[Any]) -> list[Any]:
    """Puts each value of a lowered operation behind an optimization barrier of its own."""
    return [stablehlo.OptimizationBarrierOp([value]).result for value in values]


def manual_axes() -> dict[str, int]:
    """Returns names and sizes of the mesh axes that the enclosing shard_map makes manual."""
    mesh = jax.sharding.get_abstract_mesh()
    manual = set(getattr(mesh, "manual_axes", ()))
    return {name: size for name, size in mesh.shape.items() if name in manual}


def automatic_axes() -> dict[str, int]:
    """Returns names and sizes of the mesh axes that are not manual and longer than one."""
    mesh = jax.sharding.get_abstract_mesh()
    manual = set(getattr(mesh, "manual_axes", ()))
    return {name: size for name, size in mesh.shape.items() if name not in manual and size > 1}


class AmbientMeshes(NamedTuple):
    """The meshes that surround the caller, as far as they are known.

    JAX traces the body of a jax.shard_map with the abstract mesh alone. The devices are known if
    no jit surrounds the shard_map, or if jax.set_mesh does: JAX compares its mesh with the mesh of
    the shard_map.

    Attributes:
      abstract: the innermost mesh without its devices; empty if there is none.
      known: meshes with devices, the innermost first.
      around: the mesh of a `with mesh:`; a shard_map inside it may have another mesh.
    """

    abstract: jax.sharding.AbstractMesh
    known: list[jax.sharding.Mesh]
    around: jax.sharding.Mesh | None


def ambient_meshes() -> AmbientMeshes:
    """Returns the meshes that surround the caller."""
    found: list[Any] = []
    trace = core.trace_ctx.trace
    while trace is not None:
        found.append(getattr(trace, "mesh", None))
        trace = getattr(trace, "parent_trace", None)
    found.append(mesh_internals.get_concrete_mesh())
    known = [m for m in found if isinstance(m, jax.sharding.Mesh) and not m.empty]
    physical: jax.sharding.Mesh = mesh_internals.thread_resources.env.physical_mesh
    around = None if physical.empty else physical
    abstract = jax.sharding.get_abstract_mesh()
    if abstract.empty:
        abstract = (known[0] if known else physical).abstract_mesh
    return AmbientMeshes(abstract, known, around)


@contextmanager
def clean_context() -> Iterator[None]:
    """Runs its body as at the top of a program, wherever the caller is.

    The caller may be inside a function that JAX traces, inside jax.shard_map, under another mesh,
    under disable_jit, or under a transfer guard.
    """
    with (
        core.eval_context(),
        jax.disable_jit(False),
        jax.transfer_guard("allow"),
        sharding_impls._internal_use_concrete_mesh(mesh_internals.empty_concrete_mesh),
        jax.sharding.use_abstract_mesh(mesh_internals.empty_abstract_mesh),
    ):
        yield


def varying_axes(aval: Any) -> frozenset[str]:
    """Returns the axes over which a value is typed as varying; none under check_vma=False."""
    manual = getattr(aval, "manual_axis_type", None)
    return frozenset() if manual is None else frozenset(manual.varying)


def vary_alike(arrays: Sequence[jax.Array], axes: Sequence[str]) -> tuple[jax.Array, ...]:
    """Types all arrays as varying over `axes` and over every axis that one of them varies over.

    Operands are cast before an ffi_call, which checks nothing by itself. They are cast before a
    custom_vjp, which refuses the cotangent of an operand that is typed invariant.
    """
    target = frozenset(axes).union(*(varying_axes(jax.typeof(a)) for a in arrays))

    def cast(array: jax.Array) -> jax.Array:
        array = on_device_memory(array)
        missing = tuple(sorted(target - varying_axes(jax.typeof(array))))
        return jax.lax.pcast(array, missing, to="varying") if missing else array

    return tuple(cast(a) for a in arrays)


def on_device_memory(array: Any) -> Any:
    """Returns an array in device memory; copies an array that lies in host memory."""
    space = getattr(jax.typeof(array), "memory_space", jax.memory.Space.Device)
    if space is not jax.memory.Space.Host:
        return array
    return jax.device_put(array, jax.memory.Space.Device)


def can_register_types(platform: str) -> bool:
    """Returns whether XLA takes an FFI type of a platform at once.

    XLA wants types before targets. Before there is a backend, JAX holds registrations back and
    hands types over last: XLA then refuses the targets, and JAX has no backend. On the CPU no
    registration needs to wait.
    """
    register = getattr(getattr(xla_client, "_xla", None), "register_custom_type", None)
    if platform == "cpu" and register is not None:
        xla_client.register_custom_type_handler(platform, register)
    return platform in map(_platform_of, getattr(xla_client, "_custom_type_id_handler", ()))


def _platform_of(xla_name: str) -> str:
    return "cpu" if xla_name == "Host" else xla_name


def when_plugins_begin(callback: Callable[[], None]) -> None:
    """Calls back when JAX has found its plugins (GPUs), or now; never if there are none."""
    xla_bridge.register_plugin_callbacks(lambda c_api: callback())


def distributed_client() -> Any:
    """Returns the client of jax.distributed's key-value store; None if it was not initialised."""
    return distributed.global_state.client


def default_heartbeat_timeout() -> float:
    """Returns JAX's default of heartbeat_timeout_seconds.

    After this time JAX aborts processes that wait for a lost one. The program may have passed
    another value to jax.distributed.initialize. JAX hands it to C++ and keeps no copy to read.
    """
    arguments = inspect.signature(distributed.State.initialize).parameters
    return float(arguments["heartbeat_timeout_seconds"].default)


def abandon_runtime() -> None:
    """Keeps JAX from waiting for all processes, lost ones included, when this process exits.

    The client and the service of jax.distributed are not destroyed: their destructors would wait.
    The clients of the devices and their arrays are not destroyed: a collective whose peer has gone
    may still run. For the same reason nobody waits for effects. JAX's thread pool is not destroyed:
    in a forked child its destructor would wait for threads that the child does not have.
    """
    tokens = dispatch.runtime_tokens
    held = [*tokens.current_tokens.values(), *tokens.output_runtime_tokens.values()]
    tokens.clear()
    for backend in xla_bridge._backends.values():  # backends() might make new ones
        held += [backend, *backend.live_executables(), *backend.live_arrays()]
    held.append(mlir_internals.global_thread_pool)
    for each in held:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(each))
    state = distributed.global_state
    for name in ("preemption_sync_manager", "client", "service"):
        held = getattr(state, name)
        if held is not None:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(held))
            setattr(state, name, None)


def is_gone(array: jax.Array, error: BaseException) -> bool:
    """Returns whether a look at an array raised this error because the array is deleted or donated.

    While a program takes over a donated array, JAX already refuses a look at the array, but does
    not yet call it deleted. Only the words of the error tell.
    """
    return array.is_deleted() or "deleted or donated buffer" in str(error)


def is_ready(array: jax.Array) -> bool:
    """Returns whether block_until_ready would not wait in this process, as for a deleted array."""
    if array.is_deleted():  # is_ready() of JAX 0.10 would end the process
        return True
    try:
        found: bool = array.is_ready()  # type: ignore[attr-defined]
    except RuntimeError as e:
        if not is_gone(array, e):
            raise
        return True
    return found


def plain_array(array: jax.Array) -> jax.Array | None:
    """Returns the array, or the array that holds the bits of a key array; None: it is deleted."""
    if not jax.numpy.issubdtype(array.dtype, jax.dtypes.prng_key):
        return array
    return None if array.is_deleted() else jax.random.key_data(array)


def wait_for_effects() -> list[Exception]:
    """Waits for the effects of this thread; returns their failures.

    jax.effects_barrier up to JAX 0.11 stops at the first failure, and raises it again next time.
    """
    problems: list[Exception] = []
    tokens = dispatch.runtime_tokens
    for token in [*tokens.current_tokens.values(), *tokens.output_runtime_tokens.values()]:
        try:
            token.block_until_ready()
        except jax.errors.JaxRuntimeError as e:
            problems.append(e)
    tokens.clear()
    return problems


class _ExcusedToken:
    """A token of unordered effects whose wait never raises."""

    def __init__(self, token: Any):
        self._token = token

    def block_until_ready(self) -> None:
        with suppress(jax.errors.JaxRuntimeError):
            self._token.block_until_ready()


def excuse_effects() -> None:
    """Makes JAX raise no failure for the effects that this thread has had. Does not wait."""
    tokens = dispatch.runtime_tokens
    # A later program with ordered effects would take the failed token as an operand, and fail.
    tokens.current_tokens.clear()
    for device, token in tokens.output_runtime_tokens.items():
        tokens.output_runtime_tokens[device] = _ExcusedToken(token)


def on_second_stream(fn: Callable[P, T]) -> Callable[P, T]:
    """Returns `fn`, whose kernels XLA:GPU launches on a second compute stream.

    Other platforms ignore the stream.
    """
    # JAX 0.11 put compute_on2 in the place of compute_on; later it was renamed to compute_on.
    annotate = getattr(compute_on_module, "compute_on2", compute_on_module.compute_on)
    on_stream: Callable[P, T] = annotate(
        fn, compute_type="gpu_stream:1", out_memory_spaces=jax.memory.Space.Device
    )
    return on_stream


def result_aval(
    shape: Sequence[int], dtype: Any, operands: Sequence[Any], *, varying: Any = None
) -> Any:
    """Returns the abstract value of a primitive's result.

    The result varies over the axes `varying`; None: over every axis of one of `operands`.
    """
    first = operands[0]
    if varying is None:
        varying = frozenset().union(*(varying_axes(a) for a in operands))
    aval = first.update(shape=tuple(shape), dtype=jax.numpy.dtype(dtype), weak_type=False)
    if varying == varying_axes(first):
        return aval
    return aval.update(manual_axis_type=first.manual_axis_type.update(varying=varying))


def lowering_mesh(ctx: Any) -> "jax.sharding.Mesh | None":
    """Returns the mesh that a primitive is lowered for; None if JAX does not know its devices."""
    mesh = getattr(ctx.module_context.axis_context, "mesh", None)
    return mesh if isinstance(mesh, jax.sharding.Mesh) else None


def number_in_program(ctx: Any) -> int:
    """Returns the index of a call in its program, in the order of lowering: 0 for the first."""
    # The contexts of one module share this dictionary. jax_ep keeps nothing else in it.
    shared = ctx.module_context.cached_primitive_lowerings
    number: int = next(shared.setdefault("jax_ep.number_in_program", itertools.count()))
    return number
