"""Executables that are loaded in a process that has opened no group."""

import re
import subprocess
import sys

import pytest

PROGRAM = """
import pickle, sys
from pathlib import Path
import jax
import numpy as np
from jax.experimental import serialize_executable
from jax.sharding import NamedSharding, PartitionSpec as P
import jax_ep
from jax_ep.testing import virtual_devices
from jax_ep.testing.ranks import make_mesh, on_ranks
virtual_devices()
mesh = make_mesh(2)
devices = list(mesh.devices.flat)
x = np.arange(2 * 4 * 8, dtype=np.float32).reshape(2, 4, 8)
ids = np.arange(8, dtype=np.int32).reshape(2, 4, 1) % 2
args = jax.device_put((x, ids), NamedSharding(mesh, P("ep")))
file, how = Path(sys.argv[1]), sys.argv[2]
"""

WRITES = """
def fn(x, ids):
    out = jax_ep.dispatch(x, ids, group=group, num_experts=2)
    return jax_ep.combine(out.x, out.handle)

with jax_ep.Group.open(mesh, "ep", name="wanted") as group:
    step = on_ranks(fn, mesh)
    if how == "export":
        checks = jax_ep.export_safety_checks()
        text = jax.export.export(step, disabled_checks=checks)(*args).serialize()
    else:
        text = pickle.dumps(serialize_executable.serialize(step.lower(*args).compile()))
    file.write_bytes(text)
    print(group.identity)
"""

LOADS = """
def load():
    text = file.read_bytes()
    if how == "export":
        return jax.jit(jax.export.deserialize(bytearray(text)).call)
    return serialize_executable.deserialize_and_load(
        *pickle.loads(text), execution_devices=devices
    )

try:
    load()(*args)
    raise AssertionError
except jax.errors.JaxRuntimeError as e:
    print(e)
with jax_ep.Group.open(mesh, "ep", name="wanted"):
    np.testing.assert_array_equal(load()(*args), x)
"""


def _run(program, *argv):
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, argv)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("how", ["export", "serialized"])
def test_an_executable_names_the_group_that_it_wants(tmp_path, how):
    identity = _run(PROGRAM + WRITES, tmp_path / "file", how).strip()
    said = _run(PROGRAM + LOADS, tmp_path / "file", how)
    assert re.search(rf"jax_ep: group {identity} is not open", said)


def test_import_makes_no_backend():
    code = "import jax_ep; from jax._src import xla_bridge; print(len(xla_bridge._backends))"
    assert _run(code).strip() == "0"


def test_a_module_that_cannot_be_registered_leaves_jax_alone():
    code = """
import sys
sys.modules["jax_ep._jax_ep_cpu"] = None  # importing it raises ImportError
import jax, jax_ep
print(jax.numpy.arange(3).sum())
with jax_ep.Group.open(jax.make_mesh((1,), ("ep",)), "ep") as group:
    print(group.backend, group.info().backends["cpu"])
"""
    first, second = _run(code).splitlines()
    assert first == "3"
    assert second.startswith("xla back end 'cpu': its native module was not built")
