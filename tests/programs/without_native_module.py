"""Uses JAX, and opens a group, where the native module cannot be imported."""

import sys
from typing import Any

import jax

modules: dict[str, Any] = sys.modules
modules["jax_ep._jax_ep_cpu"] = None  # importing it raises ImportError
import jax_ep  # noqa: E402

print(jax.numpy.arange(3).sum())
with jax_ep.Group.open(jax.make_mesh((1,), ("ep",)), "ep") as group:
    print(group.backend, group.info().backends["cpu"])
