"""Groups over several processes of CPU devices on one host."""

import re
import signal

import pytest
from process_programs import has_passed, number_behind, run_on_cpus

pytestmark = pytest.mark.dealt

_ALL = {"marks": [pytest.mark.slow, pytest.mark.timeout(1500)]}


@pytest.mark.parametrize(
    ("processes", "devices", "backend", "every"),
    [
        (2, 4, "cpu", 12),
        (4, 2, "cpu", 60),
        (2, 2, "xla", 80),
        pytest.param(2, 4, "cpu", 1, **_ALL),
        pytest.param(4, 2, "cpu", 1, **_ALL),
        pytest.param(2, 2, "xla", 1, **_ALL),
    ],
)
@pytest.mark.timeout(300)
def test_processes_pass_the_suite(processes, devices, backend, every):
    deadline = 1400.0 if every == 1 else 280.0
    sizes = {"processes": processes, "devices": devices, "deadline": deadline}
    for output in run_on_cpus("conformance_on_cpus", backend, str(every), **sizes):
        assert has_passed(output)


def test_independent_calls_mixed_with_psums_meet():
    assert all(has_passed(output) for output in run_on_cpus("independent_calls", devices=4))


def test_calls_of_a_batch_meet():
    """Calls of a batch, and of pipeline stages, find their peers in the other process."""
    assert all(has_passed(output) for output in run_on_cpus("batches"))


def test_groups_open_over_a_part_of_the_processes():
    outputs = run_on_cpus("subsets_of_processes", processes=4)
    for process, output in enumerate(outputs):
        own, other = ("[0, 1]", "[2, 3]") if process < 2 else ("[2, 3]", "[0, 1]")
        assert re.findall(r"passed .*", output) == [f"passed {own}"]
        assert re.findall(r"refused .*", output) == [f"refused {other}"]


def test_slices_that_cross_processes_keep_to_themselves():
    assert all(has_passed(output) for output in run_on_cpus("slices_across_processes", devices=4))


@pytest.mark.parametrize("processes", [2, 3])
def test_a_killed_process_is_named_at_once(processes):
    """The other processes exit with their own codes, though JAX would wait for the killed one."""
    codes = [7] * processes
    codes[1] = -signal.SIGKILL
    outputs = run_on_cpus("miss_a_rank", "SIGKILL", processes=processes, exit_codes=codes)
    for output in outputs[:1] + outputs[2:]:
        assert "waited for rank 2, whose process has ended" in output
        assert number_behind("waited", output) < 2.0


@pytest.mark.parametrize("step", [["calls"], ["calls", "psums"], ["psums"]], ids="-".join)
def test_a_process_killed_within_a_program_is_named(step):
    """The step may have XLA's collectives, which fail with their own message, or wait."""
    survivor, killed = run_on_cpus(
        "killed_within_a_program", *step, exit_codes=[7, -signal.SIGKILL]
    )
    assert "waited for rank 2, whose process has ended" in survivor
    raised, at = (number_behind("(?:raised|killed)", o) for o in (survivor, killed))
    # Processes raise at once, or after a timeout if all of them wait in XLA's collective.
    assert 0 < raised - at < (4.0 if "psums" in step else 2.0)


@pytest.mark.parametrize("process", [0, 1])
def test_an_exception_of_one_process_ends_all_with_codes_of_their_own(process):
    codes = [7, 7]
    codes[process] = 1
    outputs = run_on_cpus("one_raises", str(process), exit_codes=codes)
    assert "ValueError: not today" in outputs[process]
    assert f"waited for rank {2 * process}" in outputs[1 - process]


def test_a_loss_is_raised_while_a_collective_of_xla_still_waits():
    early, late = run_on_cpus("late_beside_psums", exit_codes=[7, 7])
    assert re.search(r"dispatch: rank [01] waited for rank [23] until the timeout", early)
    assert number_behind("waited", early) < 3.0
    assert re.search(r"waited for rank [0-3]", late)


def test_a_rank_that_does_not_come_is_named_in_every_process():
    for output in run_on_cpus("miss_a_rank", "skip", exit_codes=[7, 7]):
        assert "waited for rank 3 until the timeout: expected 4 ranks, got 3" in output
        assert number_behind("waited", output) < 4.0


def test_compiled_functions_run_with_the_group_that_is_opened_again():
    for output in run_on_cpus("open_after_a_loss"):
        assert has_passed(output)
        assert output.count("until the timeout") == 2


def test_a_forked_child_leaves_the_group_to_its_parent():
    """The child cannot use the group, and nothing that it does then harms the parents."""
    assert all(has_passed(output) for output in run_on_cpus("forks"))
