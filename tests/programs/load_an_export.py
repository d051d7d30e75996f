"""Loads the exported program argv[1] before and after its group opens."""

import sys
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_ep

mesh = Mesh(np.array(jax.devices("gpu")), ("ep",))
x = np.arange(mesh.size * 4 * 8, dtype=np.float32).reshape(mesh.size, 4, 8)
ids = np.arange(mesh.size * 4, dtype=np.int32).reshape(mesh.size, 4, 1) % mesh.size
args = jax.device_put((x, ids), NamedSharding(mesh, P("ep")))
text = bytearray(Path(sys.argv[1]).read_bytes())
try:
    jax.jit(jax.export.deserialize(text).call)(*args)
    raise AssertionError
except jax.errors.JaxRuntimeError as e:
    print(e)
with jax_ep.Group.open(mesh, "ep", name="wanted", backend="cuda"):
    np.testing.assert_array_equal(jax.jit(jax.export.deserialize(text).call)(*args), x)
