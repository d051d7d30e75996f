"""Processes that differ in details that must not matter: their calls still meet."""

import re

import pytest
from process_programs import has_passed, run_on_cpus

pytestmark = pytest.mark.dealt


def _run(how, folder, **options):
    for output in run_on_cpus("differing_processes", how, str(folder), **options):
        assert has_passed(output)


@pytest.mark.parametrize("how", ["line", "locations", "clear", "text", "alone"])
def test_calls_of_different_processes_meet(how, tmp_path):
    _run(how, tmp_path)


def test_calls_meet_with_one_device_a_process(tmp_path):
    _run("clear", tmp_path, processes=3, devices=1)


def test_calls_meet_if_one_process_has_a_warm_compilation_cache(tmp_path):
    _run("cache", tmp_path)
    assert any(tmp_path.iterdir())
    _run("cache", tmp_path)


def test_the_place_where_a_rank_waits_instead_is_named():
    outputs = run_on_cpus("other_operations", exit_codes=[7, 7])
    places = ["rank [23] waits in all_reduce, launch 2", "rank [01] waits in dispatch, launch 2"]
    told = [place for place in places if any(re.search(place, output) for output in outputs)]
    assert told, outputs
