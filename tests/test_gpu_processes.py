"""One process per NVIDIA GPU: JAX_PLATFORMS=cuda,cpu pytest -m gpu."""

import re
import signal

import pytest

from jax_ep.testing import launch

pytestmark = pytest.mark.gpu

START = """
import os, signal, sys, time
from jax_ep.testing import launch
launch.initialize()
import jax, jax_ep
import jax.numpy as jnp
import numpy as np
from jax_ep.testing import conformance
from jax_ep.testing.compare import assert_same_bits
from jax_ep.testing.ranks import make_mesh, on_group
mesh = make_mesh(len(jax.devices()))
me = jax.process_index()
R = mesh.devices.size
assert R == jax.process_count() > 1
"""

CONFORMANCE = """
with jax_ep.Group.open(mesh, "ep", timeout=60.0) as group:
    info = group.info()
    assert info.backend == "cuda", info
    checks = [c for c in conformance.CHECKS if c.not_usable(group, "cuda") is None]
    assert len(checks) > 50
    for check in checks[::int(sys.argv[2])]:
        print("checking", check, flush=True)
        check(group, "cuda")
print("passed")
"""

MANY = """
with jax_ep.Group.open(mesh, "ep", timeout=60.0) as group:
    def run(x, seeds):
        def step(carry, key):
            x, num_wrong = carry
            ids = jax.random.randint(key, (x.shape[0], 4), -1, 4 * R)
            out = jax_ep.dispatch(x, ids, group=group, num_experts=4 * R)
            y = jax_ep.combine(out.x, out.handle)
            ranks = jnp.where(ids >= 0, ids // 4, -1)
            times = sum(jnp.any(ranks == r, axis=1) for r in range(R))
            num_wrong += jnp.sum(y != x * times[:, None].astype(x.dtype))
            return ((x + 1) % 64, num_wrong), None
        zero = jax.lax.pcast(jnp.int32(0), "ep", to="varying")
        keys = jax.random.split(jax.random.key(seeds[0]), 2000)
        return jax.lax.scan(step, (x, zero), keys)[0][1][None]

    x = np.arange(R * 32 * 128, dtype=np.float32).reshape(R, 32, 128) % 61
    num_wrong = on_group(run, group)(x, np.arange(R)[:, None])
    group.check(num_wrong)
    assert_same_bits(num_wrong, np.zeros((R, 1), np.int32))
print("passed")
"""

MISSING = """
group = jax_ep.Group.open(mesh, "ep", timeout=3.0)
def echo(x, ids):
    out = jax_ep.dispatch(x, ids, group=group, num_experts=4 * R)
    return jax_ep.combine(out.x, out.handle)
run = on_group(echo, group)
x = np.ones((R, 16, 64), np.float32)
ids = np.zeros((R, 16, 2), np.int32)
for i in range(10):
    run(x, ids)
group.check()
start = time.monotonic()
try:
    for i in range(10):
        if i == 5 and me == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        start = time.monotonic()
        y = run(x, ids)
        group.check(y)
except jax_ep.PeerTimeoutError as e:
    print("waited", time.monotonic() - start)
    print(e, flush=True)
    sys.exit(7)
"""


@pytest.fixture(scope="module")
def num_gpus():
    found = launch.count_gpus()
    if found < 2:
        pytest.skip("needs two GPUs")
    return found


def _run(program, num_gpus, *argv, deadline=240.0, exit_codes=None):
    return launch.launch(
        ["-c", START + program, str(num_gpus), *argv],
        num_processes=num_gpus,
        deadline=deadline,
        environment={"XLA_FLAGS": "", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.4"},
        exit_codes=exit_codes,
    )


@pytest.mark.timeout(300)
@pytest.mark.parametrize("every", [20, pytest.param(1, marks=pytest.mark.slow)])
def test_conformance(num_gpus, every):
    for output in _run(CONFORMANCE, num_gpus, str(every)):
        assert output.count("passed\n") == 1


def test_many_calls(num_gpus):
    assert all(output.count("passed\n") == 1 for output in _run(MANY, num_gpus))


def test_a_killed_process_is_named(num_gpus):
    """When the time is up: a GPU does not see a process end."""
    codes = [7] * num_gpus
    codes[1] = -signal.SIGKILL
    outputs = _run(MISSING, num_gpus, exit_codes=codes)
    for output in outputs[:1] + outputs[2:]:
        assert "waited for rank 1 until the timeout" in output
        assert float(re.search(r"waited ([\d.]+)\n", output)[1]) < 4.0
