"""Groups on NVIDIA GPUs that open while JAX traces, and executables loaded before their group."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from process_programs import path_of
from steps import make_echo

import jax_ep
from jax_ep.testing.compare import assert_same_bits
from jax_ep.testing.ranks import on_ranks

pytestmark = pytest.mark.gpu


def _args(mesh):
    x = np.arange(mesh.size * 4 * 8, dtype=np.float32).reshape(mesh.size, 4, 8)
    return x, np.arange(mesh.size * 4, dtype=np.int32).reshape(mesh.size, 4, 1) % mesh.size


@pytest.mark.parametrize("jit", [True, False], ids=["jit", "eager"])
def test_a_group_opens_and_opens_again_in_a_shard_map_body(jit):
    """Opening puts arrays on devices and waits for old calls; neither may be traced."""
    mesh = Mesh(np.array(jax.devices("gpu")), ("ep",))
    x, ids = _args(mesh)
    with jax_ep.Group.open(mesh, "ep") as group:
        step = on_ranks(make_echo(group), mesh).lower(x, ids).compile()
        assert_same_bits(step(x, ids), x)

    def body(x):
        jax_ep.Group.get(mesh, "ep", backend="cuda")
        return x

    call = jax.shard_map(body, mesh=mesh, in_specs=P("ep"), out_specs=P("ep"))
    (jax.jit(call) if jit else call)(jnp.ones(mesh.size))
    with jax_ep.Group.get(mesh, "ep"):
        assert_same_bits(step(x, ids), x)


def test_an_export_names_the_group_that_it_wants(tmp_path):
    mesh = Mesh(np.array(jax.devices("gpu")), ("ep",))
    args = jax.device_put(_args(mesh), jax.NamedSharding(mesh, P("ep")))
    file = tmp_path / "export"
    with jax_ep.Group.open(mesh, "ep", name="wanted", backend="cuda") as group:
        step = on_ranks(make_echo(group), mesh)
        checks = jax_ep.export_safety_checks()
        file.write_bytes(jax.export.export(step, disabled_checks=checks)(*args).serialize())
    done = subprocess.run(
        [sys.executable, path_of("load_an_export"), str(file)],
        # This process holds most of the memory.
        env={**os.environ, "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert f"jax_ep: group {group.identity} is not open" in done.stdout
