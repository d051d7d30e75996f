"""Native modules: functions that load them, and register their handlers with JAX.

Handlers are registered as early as possible: an executable that is loaded before its group is open
then says which group it wants. No function here creates a JAX backend.
"""

import importlib
from collections.abc import Collection
from contextlib import suppress
from types import ModuleType
from typing import Any

import jax
import numpy as np

from jax_ep._src.base import jax_compat, registry
from jax_ep._src.base.errors import GroupError

_MODULES = {"cpu": "jax_ep._jax_ep_cpu", "cuda": "jax_ep._jax_ep_cuda"}
_WHY_NOT_BUILT = {
    "cpu": "",
    "cuda": ": there was no CUDA compiler when jax_ep was installed, or JAX_EP_CUDA=OFF was set",
}
_JAX_PLATFORM = {"cpu": "cpu", "cuda": "CUDA"}


def load(backend: str) -> ModuleType:
    """Returns the native module of a back end; a GroupError says why there is none."""
    try:
        return importlib.import_module(_MODULES[backend])
    except ImportError as e:
        if isinstance(e, ModuleNotFoundError) and e.name == _MODULES[backend]:
            raise GroupError(
                f"back end {backend!r}: its native module was not built{_WHY_NOT_BUILT[backend]}"
            ) from e
        raise GroupError(f"back end {backend!r}: its native module cannot be loaded: {e}") from e


def builds(platforms: Collection[str]) -> dict[str, str]:
    """Returns the builds of the modules for these platforms. Processes of a group must agree.

    The processes share structs and messages in memory, so their layouts must be equal. A module
    that cannot be loaded counts as "none".
    """
    found = {}
    for backend in ("cpu", "cuda") if "gpu" in platforms else ("cpu",):
        try:
            info = load(backend).build_info()
            sizes = ", ".join(f"{name} {size}" for name, size in info["sizes"].items())
            built = f"{info['build']} (protocol {info['protocol']}; bytes: {sizes})"
        except GroupError:
            built = "none"
        found[f"the build of their {backend} modules"] = built
    return found


def register(backend: str) -> ModuleType:
    """Loads a module and registers its types and targets, once per process."""
    module = load(backend)
    if backend in registry.registered_backends:
        return module
    platform = _JAX_PLATFORM[backend]
    types: dict[str, Any] = module.types() if hasattr(module, "types") else {}
    for name, capsules in types.items():
        jax.ffi.register_ffi_type(name, capsules, platform=platform)
    for name, stages in module.registrations().items():
        jax.ffi.register_ffi_target(name, stages, platform=platform)
    registry.registered_backends.add(backend)
    return module


def register_early() -> None:
    """Registers the CPU module at once, and the CUDA module when JAX has found its plugin."""
    _register_quietly("cpu")
    jax_compat.when_plugins_begin(lambda: _register_quietly("cuda"))


def _register_quietly(backend: str) -> None:
    if jax_compat.can_register_types(_JAX_PLATFORM[backend]):
        # A program without groups must not fail here. Group.open registers again, and raises.
        with suppress(Exception):
            register(backend)


def targets(backend: str) -> list[str]:
    """Returns the names of the operations that the module of a back end holds."""
    return sorted(name.removeprefix("jax_ep.") for name in load(backend).registrations())


def cuda_device_of(device: jax.Device) -> int:
    """Returns CUDA's number of a GPU of this process. JAX may number its GPUs from 0."""
    buffer = jax.device_put(np.zeros(1, np.float32), device)
    found: int = load("cuda").device_of(buffer.unsafe_buffer_pointer())
    return found
