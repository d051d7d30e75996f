"""Groups over several hosts: their nodes, and custom calls if each slice lies in one host."""

import re
import signal
import warnings

import jax
import pytest
from process_programs import has_passed, number_behind, run_on_cpus

import jax_ep
from jax_ep._src.base.spec import Usability
from jax_ep._src.opening import usability
from jax_ep._src.processes.domains import find_nodes
from jax_ep._src.processes.neighbourhoods import neighbourhoods
from jax_ep.testing.ranks import make_mesh

pytestmark = pytest.mark.dealt


@pytest.mark.parametrize(
    ("owners", "slices", "expected"),
    [
        ([0, 0, 1, 1], [0, 0, 1, 1], [[0], [1]]),
        ([0, 0, 1, 1], [0, 1, 0, 1], [[0, 1]]),
        ([0, 1, 2, 3], [0, 0, 1, 1], [[0, 1], [2, 3]]),
        ([3, 1, 2, 0], [0, 1, 0, 1], [[0, 1], [2, 3]]),
        ([0, 1, 1, 2, 3, 3], [0, 0, 1, 1, 2, 2], [[0, 1, 2], [3]]),  # process 1 joins two slices
        ([0, 2, 1, 3, 2, 3], [0, 0, 1, 1, 2, 2], [[0, 1, 2, 3]]),  # the last slice joins two sets
    ],
)
def test_neighbourhoods_join_processes_that_share_slices(owners, slices, expected):
    assert neighbourhoods(owners, slices) == expected


def _racks(num_ranks, per_rack):
    return [f"rack {rank // per_rack}" for rank in range(num_ranks)]


@pytest.mark.parametrize(
    ("domains", "expected", "origin"),
    [
        (["a"], 1, "each slice is on one host"),
        (["aaaa"], 4, "each slice is on one host"),
        (["aa", "bb", "aa"], 2, "each slice is on one host"),
        (["aabb"], 2, "the ranks of each host"),
        (["ab", "ba", "cd"], 2, "each host has one rank of a slice, so no host adds anything up"),
        (["bbaa", "aacc"], 2, "the ranks of each host"),
        ([_racks(2048, 8)], 8, "the ranks of each host"),
        ([_racks(2048, 2048)], 2048, "each slice is on one host"),
        ([_racks(576, 72), _racks(576, 72)], 72, "the ranks of each host"),
        ([_racks(2048, 72)], 2048, "hosts have different numbers of ranks of a slice: 32 and 72"),
        (["aaab"], 4, "hosts have different numbers of ranks of a slice: 1 and 3"),
        (["aabb", "aaaa"], 4, "hosts have different numbers of ranks of a slice: 2 and 4"),
        (["aabb", ["a", "a", "", "b"]], 4, "the host of rank 2 is not known"),
        (
            ["aabb", "abba"],
            4,
            "the ranks of a host are not consecutive: ranks 0 and 3 of slice 1 share a host, rank "
            "2 is on another one",
        ),
        (
            [[f"host {rank % 8}" for rank in range(2048)]],
            2048,
            "the ranks of a host are not consecutive: ranks 0 and 8 of slice 0 share a host, rank "
            "7 is on another one",
        ),
    ],
)
def test_nodes_are_the_domains_if_these_are_equal(domains, expected, origin):
    assert find_nodes([list(names) for names in domains]) == (expected, origin)


@pytest.mark.parametrize(("processes", "per_host", "devices"), [(2, 1, 2), (4, 2, 1), (3, 1, 2)])
def test_slices_inside_a_host_take_the_custom_calls(processes, per_host, devices):
    sizes = {"processes": processes, "devices": devices}
    for output in run_on_cpus("train_over_hosts", str(per_host), "cpu", **sizes):
        assert has_passed(output)
        assert "UserWarning" not in output


def test_a_lost_process_fails_its_neighbours():
    codes = [7, -signal.SIGKILL, 7, 7]
    outputs = run_on_cpus("lost_beside_hosts", "2", processes=4, devices=1, exit_codes=codes)
    assert "waited for rank 1, whose process has ended" in outputs[0]
    assert number_behind("waited", outputs[0]) < 5.0
    assert [has_passed(output) for output in outputs[2:]] == [True, True]


def test_a_lost_process_is_known_on_its_host():
    """Processes that share no slice with it know, too: XLA's collectives wait for it."""
    survivor, killed = run_on_cpus("killed_outside_a_block", exit_codes=[7, -signal.SIGKILL])
    assert "whose process has ended" in survivor
    raised, at = (number_behind("(?:raised|killed)", o) for o in (survivor, killed))
    assert raised - at < 8.0


@pytest.mark.parametrize("stopped", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_process_of_another_host_that_is_silent_fails_the_group(stopped):
    """XLA's collectives wait for it. If it is process 0, the store does not answer either."""
    codes = [7, 7]
    codes[stopped] = -signal.SIGKILL
    outputs = run_on_cpus("stopped_on_another_host", "1", str(stopped), exit_codes=codes)
    survivor = outputs[1 - stopped]
    assert 2.0 <= number_behind("waited", survivor) < 10.0
    assert "gives no sign of life: its process, its host or the link to it" in survivor
    assert number_behind("peer", survivor) == stopped


@pytest.mark.parametrize("per_host", [1, 2])
def test_the_first_process_waits_for_the_others_when_it_fails(per_host):
    """Its end would abort the others. They share no slice with it, and may be on another host."""
    first, _ = run_on_cpus("first_of_hosts_fails", str(per_host), exit_codes=[1, 7])
    assert "ValueError: not today" in first


def test_slices_that_span_hosts_take_xla():
    first, second = run_on_cpus("slices_across_hosts", "1")
    why = "a slice of the mesh spans hosts or containers: {0: 'host0', 1: 'host1'}"
    for output in (first, second):
        assert why in output.splitlines()
        assert f"backend 'cpu' is not usable here: {why}" in output
    warning = r"UserWarning: Group.open: group expert-\w+ runs on stock collectives, back end 'xla'"
    assert re.search(rf"{warning}: {re.escape(why)}", first)
    assert re.search(r"slices_across_hosts.py:\d+: UserWarning: Group.open: timeout=150 s", first)
    assert "stock collectives" not in second
    for output in (first, second):
        assert (
            "the processes disagree about ranks_per_node: process 0 has 4, process 1 has 2"
            in output
        )
        assert has_passed(output)


def test_auto_warns_of_a_fallback_once(monkeypatch):
    monkeypatch.setattr(
        usability,
        "_cpu",
        lambda *_: Usability(frozenset(), "not today"),
    )
    mesh = make_mesh(2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            with jax_ep.Group.open(mesh, "ep", name="falls back") as group:
                assert group.backend == "xla"
    (told,) = caught
    assert "back end 'xla': not today" in str(told.message)
    assert told.filename == __file__


def test_a_warning_that_is_an_error_leaves_no_group(monkeypatch):
    unusable = Usability(frozenset(), "not today")
    monkeypatch.setattr(usability, "_cpu", lambda *_: unusable)
    for _ in range(2):
        with pytest.raises(UserWarning, match="not today"):
            jax_ep.Group.open(make_mesh(2), "ep", name="warns")


def test_a_named_back_end_warns_of_nothing():
    with jax_ep.Group.open(make_mesh(2), "ep", name="wanted", backend="xla"):
        assert jax.default_backend() == "cpu"
