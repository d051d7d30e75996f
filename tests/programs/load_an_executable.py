"""Loads the executable of the file argv[1] before and after its group opens."""

import pickle

import jax
import numpy as np
from executables import args, file, how, mesh, x
from jax.experimental import serialize_executable

import jax_ep


def load():
    text = file.read_bytes()
    if how == "export":
        return jax.jit(jax.export.deserialize(bytearray(text)).call)
    executable, in_tree, out_tree = pickle.loads(text)
    return serialize_executable.deserialize_and_load(
        executable, in_tree, out_tree, execution_devices=list(mesh.devices.flat)
    )


try:
    load()(*args)
    raise AssertionError
except jax.errors.JaxRuntimeError as e:
    print(e)
with jax_ep.Group.open(mesh, "ep", name="wanted"):
    np.testing.assert_array_equal(load()(*args), x)
