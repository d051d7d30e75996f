"""Programs of several processes on NVIDIA GPUs: JAX_PLATFORMS=cuda,cpu pytest -m gpu."""

import os
import re
import shutil
import signal
import subprocess
from contextlib import suppress

import pytest
from process_programs import (
    HOSTS,
    INTERRUPTED,
    MIDDLE,
    MISSING,
    REOPEN,
    REOPENED,
    START,
    TRAIN_OVER_HOSTS,
    number_behind,
)

from jax_ep.testing import launch

pytestmark = pytest.mark.gpu

GPUS = """
from jax_ep.testing.conformance import reductions
assert R == max(jax.process_count(), launch.count_gpus()) > 1
assert jax.process_count() == int(os.environ["JAX_EP_NUM_PROCESSES"])
"""

CONFORMANCE = """
with jax_ep.Group.open(mesh, "ep", timeout=20.0) as group:
    info = group.info()
    assert info.backend == "cuda", info
    assert (info.staging is not None) == ("stages" in sys.argv), info
    checks = [c for c in conformance.CHECKS if c.not_usable(group, "cuda") is None]
    if "shares" in sys.argv:
        checks = [c for c in checks if not c.uses_stock]
    assert len(checks) > 50
    chosen = checks[::int(sys.argv[1])]
    if "sums" in sys.argv:
        chosen = [c for c in checks if c.run.__module__ == reductions.__name__]
    for check in chosen:
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

TOLD = """
group = jax_ep.Group.open(mesh, "ep", timeout=2.0)
run = on_group(lambda x, ids: echo(group, x, ids), group)
group.check(run(x, ids))
start = time.monotonic()
try:
    if me == 1:
        group.check(run(x, ids))
    while me != 1 and time.monotonic() < start + 30:
        group.check()
        time.sleep(0.1)
except jax_ep.PeerTimeoutError as e:
    print(e)
"""

CONSTANTS = """
with jax_ep.Group.open(mesh, "ep", timeout=20.0) as group:
    rows = np.arange(4 * 64, dtype=np.float32).reshape(4, 64)
    def run(ids):
        out = jax_ep.dispatch(jnp.asarray(rows), ids, group=group, num_experts=R)
        return jax_ep.combine(out.x, out.handle)
    y = on_group(run, group)(np.zeros((R, 4, 1), np.int32) + np.arange(R)[:, None, None][::-1])
    group.check(y)
    assert_same_bits(y, np.tile(rows, (R, 1, 1)))
print("passed")
"""


CONTEXTS = """
import ctypes
cuda = ctypes.CDLL("libcuda.so.1")
def contexts():
    active, flags = ctypes.c_int(), ctypes.c_uint()
    found = []
    for device in range(launch.count_gpus()):
        cuda.cuDevicePrimaryCtxGetState(device, ctypes.byref(flags), ctypes.byref(active))
        found.append(active.value)
    return found
jnp.ones(3).block_until_ready()
before = contexts()
with jax_ep.Group.open(mesh, "ep", timeout=20.0) as group:
    assert group.backend == "cuda", group.info()
    group.check(on_group(lambda x, ids: echo(group, x, ids), group)(x, ids))
assert contexts() == before, (before, contexts())
print("passed")
"""


@pytest.fixture(scope="module")
def num_gpus():
    found = launch.count_gpus()
    if found < 2:
        pytest.skip("needs two GPUs")
    return found


@pytest.fixture(scope="module")
def mps(tmp_path_factory):
    """Returns the environment of programs whose processes share GPUs at the same time."""
    daemon = shutil.which("nvidia-cuda-mps-control")
    if daemon is None:
        pytest.skip("needs CUDA MPS")
    place = str(tmp_path_factory.mktemp("mps"))
    own = {
        "CUDA_MPS_PIPE_DIRECTORY": place,
        "CUDA_MPS_LOG_DIRECTORY": place,
        "CUDA_DEVICE_MAX_CONNECTIONS": "2",  # many clients leave no room for more
    }
    environment = {**os.environ, **own}
    subprocess.run([daemon, "-d"], env=environment, check=True, timeout=20)
    yield own
    with suppress(subprocess.TimeoutExpired):
        subprocess.run([daemon], env=environment, input=b"quit\n", check=True, timeout=20)


def _run(program, num_processes, *argv, environment=None, exit_codes=None, deadline=200.0):
    return launch.launch(
        ["-c", START + GPUS + program, *argv],
        num_processes=num_processes,
        deadline=deadline,
        environment={
            "XLA_FLAGS": "",
            "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.1",
            **(environment or {}),
        },
        exit_codes=exit_codes,
    )


def _passed(outputs):
    return [output.count("passed\n") for output in outputs] == [1] * len(outputs)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("every", [20, pytest.param(1, marks=pytest.mark.slow)])
def test_processes_pass_the_suite(num_gpus, every):
    assert _passed(_run(CONFORMANCE, num_gpus, str(every)))


@pytest.mark.timeout(300)
@pytest.mark.parametrize("room", ["0", "1", "64"])
def test_processes_pass_the_suite_with_staged_operands(num_gpus, room):
    """Some, all or no calls have room for copies. Other calls take XLA's collectives."""
    environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "JAX_EP_STAGING_MB": room}
    assert _passed(_run(CONFORMANCE, num_gpus, "40", "stages", environment=environment))


@pytest.mark.timeout(300)
@pytest.mark.parametrize("room", ["0", "1", "64"])
def test_sums_of_staged_operands_are_right(num_gpus, room):
    environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "JAX_EP_STAGING_MB": room}
    assert _passed(_run(CONFORMANCE, num_gpus, "1", "stages", "sums", environment=environment))


@pytest.mark.timeout(300)
def test_processes_pass_the_suite_with_unmapped_memory(num_gpus):
    environment = {"XLA_PYTHON_CLIENT_ALLOCATOR": "cuda_async"}
    assert _passed(_run(CONFORMANCE, num_gpus, "60", "stages", environment=environment))
    # One process must pass, too.
    alone = START.replace("launch.initialize()", "") + GPUS + CONFORMANCE
    outputs = launch.launch(
        ["-c", alone, "60", "stages"],
        num_processes=1,
        deadline=200.0,
        environment={"XLA_FLAGS": "", **environment},
    )
    assert _passed(outputs)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("per_gpu", [2, 4])
def test_more_ranks_than_gpus_pass_the_suite(num_gpus, mps, per_gpu):
    assert _passed(_run(CONFORMANCE, per_gpu * num_gpus, "20", "shares", environment=mps))


@pytest.mark.timeout(300)
@pytest.mark.parametrize("per_gpu", [2, 4])
def test_sums_of_more_ranks_than_gpus_are_right(num_gpus, mps, per_gpu):
    """The test runs all operations, algorithms and dtypes of the family."""
    outputs = _run(
        CONFORMANCE, per_gpu * num_gpus, "1", "shares", "sums", environment=mps, deadline=280.0
    )
    assert _passed(outputs)
    assert outputs[0].count("checking ") > 40


def test_slices_inside_a_host_take_the_custom_calls(num_gpus):
    """Each process claims to be on a host of its own, so each slice has one rank."""
    assert _passed(_run(HOSTS + TRAIN_OVER_HOSTS, num_gpus, "1", "cuda"))


def test_slices_of_several_processes_inside_a_host_meet(num_gpus, mps):
    outputs = _run(HOSTS + TRAIN_OVER_HOSTS, 2 * num_gpus, "2", "cuda", "shares", environment=mps)
    assert _passed(outputs)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_opening_again_and_again_leaves_nothing_behind(num_gpus):
    assert _passed(_run(REOPEN, num_gpus, "50", deadline=380.0))


def test_constants_of_the_program_are_carried_as_operands(num_gpus):
    assert _passed(_run(CONSTANTS, num_gpus))


def test_many_calls_give_right_values(num_gpus):
    assert _passed(_run(MANY, num_gpus))


@pytest.mark.timeout(300)
def test_processes_with_several_gpus_each_meet(num_gpus):
    if num_gpus < 4:
        pytest.skip("needs four GPUs")
    assert _passed(_run(CONFORMANCE, 2, "40"))
    assert _passed(_run(MANY, 2))


def test_no_context_is_made_on_a_gpu_of_another_process(num_gpus):
    assert _passed(_run(CONTEXTS, num_gpus))


def test_compiled_functions_run_with_the_group_that_is_opened_again(num_gpus):
    """The new group takes the same memory, to which captured programs refer."""
    assert _passed(_run(REOPENED, num_gpus))


def test_a_loss_after_the_last_call_is_raised(num_gpus):
    for output in _run(TOLD, num_gpus):
        assert re.search(r"rank 1 waited for rank [^1] until the timeout", output)


def test_a_killed_process_is_named(num_gpus):
    """The timeout must pass: a GPU does not see a process end."""
    codes = [7] * num_gpus
    codes[1] = -signal.SIGKILL
    outputs = _run(MISSING, num_gpus, "SIGKILL", exit_codes=codes)
    for output in outputs[:1] + outputs[2:]:
        assert "waited for rank 1 until the timeout" in output
        assert number_behind("waited", output) < 4.0


@pytest.mark.parametrize("how", ["asarray", "check"])
def test_an_interrupted_process_ends_and_the_others_raise(num_gpus, how):
    codes = [-signal.SIGINT] + [7] * (num_gpus - 1)
    outputs = _run(INTERRUPTED, num_gpus, how, "0", exit_codes=codes, deadline=60.0)
    assert "KeyboardInterrupt" in outputs[0]
    for output in outputs[1:]:
        assert "was interrupted while it waited for its peers" in output


@pytest.mark.parametrize("step", [["calls"], ["calls", "psums"], ["psums"]], ids="-".join)
def test_a_process_killed_within_a_program_is_named(num_gpus, step):
    codes = [7] * num_gpus
    codes[1] = -signal.SIGKILL
    outputs = _run(MIDDLE, num_gpus, *step, exit_codes=codes, deadline=60.0)
    killed = number_behind("killed", outputs[1])
    ways = [" until the timeout"]
    if "psums" in step:  # no rank may wait in a call then, so only the process's end tells
        ways.append(", whose process has ended")
    for output in outputs[:1] + outputs[2:]:
        assert any(f"waited for rank 1{way}" in output for way in ways)
        assert number_behind("raised", output) < killed + 4.0
