"""Openings of groups over several processes on one host, and their failures."""

import re
import signal

import pytest
from process_programs import has_passed, number_behind, run_on_cpus

pytestmark = pytest.mark.dealt


def test_opening_again_and_again_leaves_nothing_behind():
    assert all(has_passed(output) for output in run_on_cpus("open_again_and_again", "50"))


def test_settings_that_differ_are_an_error_in_every_process():
    for output in run_on_cpus("disagree"):
        assert "Group.open: the processes disagree about num_sms" in output
        assert "process 0 has 20, process 1 has 21" in output
        assert "disagree about the table of all_gather: process 0 has [[8, 'one_shot']" in output
        about = "{} Group.open: the processes disagree about the budgets of combine: process 0 has "
        had = about + "{{'rank': {{'sms': 8}}, 'expert': {{'sms': 8}}}}, process 1 has "
        theirs = ["'sms': 9", "'sms': 8, 'backend': 'xla'"]
        assert output.splitlines()[-5:] == [
            *(f"{had.format({})}{{'rank': {{'sms': 8}}, 'expert': {{{t}}}}}" for t in theirs),
            "opened {'backend': 'cpu'}",
            "opened {'num_sms': 9}",
            "opened {}",
        ]


def test_builds_that_differ_are_an_error_in_every_process():
    """Builds differ in their name, their protocol, or the sizes of their messages."""
    differ = [
        ("'{build} (protocol", "'9 (protocol"),
        ("{build} (protocol 1;", "{build} (protocol 2;"),
        ("WireMessage", "WireMessage 1)"),
    ]
    for output in run_on_cpus("other_builds"):
        build, *messages = output.splitlines()
        assert re.fullmatch(r"\d+\.\d+\.\d+\+[0-9a-f]{12}", build)
        for message, (own, other) in zip(messages, differ, strict=True):
            assert message.startswith(
                "Group.open: the processes disagree about the build of their cpu modules: "
                "process 0 has"
            )
            first, second = message.split(", process 1 has ")
            assert own.format(build=build) in first
            assert other.format(build=build) in second


def test_a_process_that_does_not_come_is_named():
    for me, output in enumerate(run_on_cpus("absent_peers")):
        assert f"process {1 - me} did not open the same group" in output
        assert "waited True" in output
        assert "opened late" in output


@pytest.mark.timeout(300)
def test_a_failure_to_open_is_raised_in_every_process():
    """Processes raise at once, with the reason, at every stage, and the next opening works."""
    for output in run_on_cpus("failures_to_open", processes=3):
        assert output.count("told of") == 6
        assert has_passed(output)


def test_openings_that_follow_one_another_do_not_mix():
    """The fastest process is in the next opening, or has failed, while others leave this one."""
    assert all(has_passed(output) for output in run_on_cpus("openings_in_a_row", processes=3))


@pytest.mark.parametrize(
    ("stage", "timeout", "how"),
    [("opening", 3.0, "until the timeout: expected 6 ranks, got 4"), ("self-test", 20.0, "ended")],
)
def test_a_process_that_dies_while_the_group_opens_is_named(stage, timeout, how):
    """Processes raise at once if their ranks wait for its ranks."""
    codes = [7, -signal.SIGKILL, 7]
    for output in run_on_cpus(
        "dies_while_opening", stage, str(timeout), processes=3, exit_codes=codes
    )[::2]:
        assert re.search(rf"waited for rank [23],? .*{how}", output)
        assert number_behind("waited", output) < (10.0 if stage == "self-test" else timeout + 3.0)


def test_memory_is_shared_or_every_process_knows_why_not():
    assert all(has_passed(output) for output in run_on_cpus("share_descriptors", processes=3))


def test_strangers_at_the_sockets_delay_no_process():
    """Strangers call as soon as a process listens, take all its room, and say nothing."""
    assert all(has_passed(output) for output in run_on_cpus("strangers_at_sockets", processes=3))


def test_a_connection_that_cannot_be_made_leaves_xla():
    """All processes fall back at once, with the reason of the process that has failed."""
    for output in run_on_cpus("unconnected", processes=3):
        assert (
            "xla process 1: no connection between the processes: the listener for process 0 is of "
            "another user" in output.splitlines()
        )


def test_memory_that_cannot_be_read_leaves_xla():
    for output in run_on_cpus("unreadable_memory"):
        assert (
            "xla process 1: the memory of process 0 cannot be read: not today"
            in output.splitlines()
        )
