"""Programs of several processes on NVIDIA GPUs: JAX_PLATFORMS=cuda,cpu pytest -m gpu."""

import os
import re
import shutil
import signal
import subprocess
from contextlib import suppress

import pytest
from process_programs import number_behind, path_of

from jax_ep.testing import launch

pytestmark = pytest.mark.gpu


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
        [path_of(program), *argv],
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
    assert _passed(_run("conformance_on_gpus", num_gpus, str(every)))


@pytest.mark.timeout(300)
@pytest.mark.parametrize("room", ["0", "1", "64"])
def test_processes_pass_the_suite_with_staged_operands(num_gpus, room):
    """Some, all or no calls have room for copies. Other calls take XLA's collectives."""
    environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "JAX_EP_STAGING_MB": room}
    assert _passed(_run("conformance_on_gpus", num_gpus, "40", "stages", environment=environment))


@pytest.mark.timeout(300)
@pytest.mark.parametrize("room", ["0", "1", "64"])
def test_sums_of_staged_operands_are_right(num_gpus, room):
    environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "JAX_EP_STAGING_MB": room}
    assert _passed(
        _run("conformance_on_gpus", num_gpus, "1", "stages", "sums", environment=environment)
    )


@pytest.mark.timeout(300)
def test_processes_pass_the_suite_with_unmapped_memory(num_gpus):
    environment = {"XLA_PYTHON_CLIENT_ALLOCATOR": "cuda_async"}
    assert _passed(_run("conformance_on_gpus", num_gpus, "60", "stages", environment=environment))
    # One process must pass, too.
    outputs = launch.launch(
        [path_of("conformance_on_gpus"), "60", "stages"],
        num_processes=1,
        deadline=200.0,
        environment={"XLA_FLAGS": "", **environment},
    )
    assert _passed(outputs)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("per_gpu", [2, 4])
def test_more_ranks_than_gpus_pass_the_suite(num_gpus, mps, per_gpu):
    assert _passed(_run("conformance_on_gpus", per_gpu * num_gpus, "20", "shares", environment=mps))


@pytest.mark.timeout(300)
@pytest.mark.parametrize("ranks_per_node", [1, 2])
def test_nodes_of_shared_gpus_pass_the_suite(num_gpus, mps, ranks_per_node):
    nodes = f"nodes={ranks_per_node}"
    outputs = _run("conformance_on_gpus", 2 * num_gpus, "9", "shares", nodes, environment=mps)
    assert _passed(outputs)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("per_gpu", [2, 4])
def test_sums_of_more_ranks_than_gpus_are_right(num_gpus, mps, per_gpu):
    """The test runs all operations, algorithms and dtypes of the family."""
    outputs = _run(
        "conformance_on_gpus",
        per_gpu * num_gpus,
        "1",
        "shares",
        "sums",
        environment=mps,
        deadline=280.0,
    )
    assert _passed(outputs)
    assert outputs[0].count("checking ") > 40


def test_slices_inside_a_host_take_the_custom_calls(num_gpus):
    """Each process claims to be on a host of its own, so each slice has one rank."""
    assert _passed(_run("train_over_hosts", num_gpus, "1", "cuda"))


def test_slices_of_several_processes_inside_a_host_meet(num_gpus, mps):
    outputs = _run("train_over_hosts", 2 * num_gpus, "2", "cuda", "shares", environment=mps)
    assert _passed(outputs)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_opening_again_and_again_leaves_nothing_behind(num_gpus):
    assert _passed(_run("open_again_and_again", num_gpus, "50", deadline=380.0))


def test_constants_of_the_program_are_carried_as_operands(num_gpus):
    assert _passed(_run("constants", num_gpus))


def test_many_calls_give_right_values(num_gpus):
    assert _passed(_run("many_calls", num_gpus))


@pytest.mark.timeout(300)
def test_processes_with_several_gpus_each_meet(num_gpus):
    if num_gpus < 4:
        pytest.skip("needs four GPUs")
    assert _passed(_run("conformance_on_gpus", 2, "40"))
    assert _passed(_run("many_calls", 2))


def test_no_context_is_made_on_a_gpu_of_another_process(num_gpus):
    assert _passed(_run("contexts", num_gpus))


def test_compiled_functions_run_with_the_group_that_is_opened_again(num_gpus):
    """The new group takes the same memory, to which captured programs refer."""
    assert _passed(_run("open_after_a_loss", num_gpus))


def test_a_loss_after_the_last_call_is_raised(num_gpus):
    for output in _run("told_by_check", num_gpus):
        assert re.search(r"rank 1 waited for rank [^1] until the timeout", output)


def test_a_killed_process_is_named(num_gpus):
    """The timeout must pass: a GPU does not see a process end."""
    codes = [7] * num_gpus
    codes[1] = -signal.SIGKILL
    outputs = _run("miss_a_rank", num_gpus, "SIGKILL", exit_codes=codes)
    for output in outputs[:1] + outputs[2:]:
        assert "waited for rank 1 until the timeout" in output
        assert number_behind("waited", output) < 4.0


@pytest.mark.parametrize("how", ["asarray", "check"])
def test_an_interrupted_process_ends_and_the_others_raise(num_gpus, how):
    codes = [-signal.SIGINT] + [7] * (num_gpus - 1)
    outputs = _run("interrupted_processes", num_gpus, how, "0", exit_codes=codes, deadline=60.0)
    assert "KeyboardInterrupt" in outputs[0]
    for output in outputs[1:]:
        assert "was interrupted while it waited for its peers" in output


@pytest.mark.parametrize("step", [["calls"], ["calls", "psums"], ["psums"]], ids="-".join)
def test_a_process_killed_within_a_program_is_named(num_gpus, step):
    codes = [7] * num_gpus
    codes[1] = -signal.SIGKILL
    outputs = _run("killed_within_a_program", num_gpus, *step, exit_codes=codes, deadline=60.0)
    killed = number_behind("killed", outputs[1])
    ways = [" until the timeout"]
    if "psums" in step:  # no rank may wait in a call then, so only the process's end tells
        ways.append(", whose process has ended")
    for output in outputs[:1] + outputs[2:]:
        assert any(f"waited for rank 1{way}" in output for way in ways)
        assert number_behind("raised", output) < killed + 4.0
