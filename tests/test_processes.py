"""Groups over two processes of two CPU devices each."""

import pytest

from jax_ep.testing import launch

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    "PJRT_NPROC": "16",
}

START = """
import sys, time
from jax_ep.testing import launch
launch.initialize()
import jax, jax_ep
from jax_ep.testing import conformance
from jax_ep.testing.ranks import make_mesh
mesh = make_mesh(4)
me = jax.process_index()
"""

CONFORMANCE = """
with jax_ep.Group.open(mesh, "ep", timeout=60.0) as group:
    info = group.info()
    assert info.backend == "xla", info
    assert "spans processes" in info.backends["cpu"], info
    checks = [c for c in conformance.CHECKS if c.not_usable(group, "xla") is None]
    for check in checks[::int(sys.argv[1])]:
        print("checking", check, flush=True)
        check(group, "xla")
print("passed")
"""

REOPEN = """
for _ in range(3):
    with jax_ep.Group.open(mesh, "ep", timeout=60.0):
        pass
print("passed")
"""

DISAGREE = """
try:
    jax_ep.Group.open(mesh, "ep", num_sms=20 + me, timeout=30.0)
except jax_ep.GroupError as e:
    print(e)
"""

ABSENT = """
start = time.monotonic()
try:
    jax_ep.Group.open(mesh, "ep", name=f"name{me}", timeout=2.0)
except jax_ep.GroupError as e:
    print(e)
print("waited", time.monotonic() - start < 3.0)
"""


def _run(program, *argv, deadline=240.0):
    return launch.launch(
        ["-c", START + program, *argv], num_processes=2, deadline=deadline, environment=ENVIRONMENT
    )


@pytest.mark.parametrize(
    "every",
    [16, pytest.param(1, marks=[pytest.mark.slow, pytest.mark.timeout(1500)])],
    ids=["some", "all"],
)
@pytest.mark.timeout(300)
def test_conformance(every):
    for output in _run(CONFORMANCE, str(every), deadline=1400.0 if every == 1 else 280.0):
        assert output.endswith("passed\n")


def test_a_group_opens_again():
    assert all(output.endswith("passed\n") for output in _run(REOPEN))


def test_settings_that_differ_are_an_error_in_every_process():
    for output in _run(DISAGREE):
        assert "Group.open: the processes disagree about num_sms" in output
        assert "process 0 has 20, process 1 has 21" in output


def test_a_process_that_does_not_come_is_named():
    for me, output in enumerate(_run(ABSENT)):
        assert f"process {1 - me} did not open the same group" in output
        assert "waited True" in output
