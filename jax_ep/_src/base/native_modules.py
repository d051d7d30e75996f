"""The native modules: loading them, and registering their handlers with JAX.

They are registered as early as possible, so that an executable which is loaded before its group is
open says which group it wants. Nothing here makes a backend of JAX.
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
    """The native module of a back end; GroupError says why it cannot be had."""
    try:
        return importlib.import_module(_MODULES[backend])
    except ImportError as e:
        if isinstance(e, ModuleNotFoundError) and e.name == _MODULES[backend]:
            raise GroupError(
                f"back end {backend!r}: its native module was not built{_WHY_NOT_BUILT[backend]}"
            ) from e
        raise GroupError(f"back end {backend!r}: its native module cannot be loaded: {e}") from e


def builds(platforms: Collection[str]) -> dict[str, str]:
    """Builds of the modules for these platforms; processes of a group must agree.

    They share memory as it is, and messages in it. A module that cannot be loaded counts as none.
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
    """When the package is imported: the CPU's now, the GPUs' when JAX has found its plugin."""
    _register_quietly("cpu")
    jax_compat.when_plugins_begin(lambda: _register_quietly("cuda"))


def _register_quietly(backend: str) -> None:
    if jax_compat.can_register_types(_JAX_PLATFORM[backend]):
        # Group.open does it again, and tells; JAX without groups must not fail by it.
        with suppress(Exception):
            register(backend)


def targets(backend: str) -> list[str]:
    """Names of the operations that a back end's module holds."""
    return sorted(name.removeprefix("jax_ep.") for name in load(backend).registrations())


def cuda_device_of(device: jax.Device) -> int:
    """What CUDA calls a GPU of this process. JAX may count those it was given from 0."""
    buffer = jax.device_put(np.zeros(1, np.float32), device)
    found: int = load("cuda").device_of(buffer.unsafe_buffer_pointer())
    return found
