"""Runs the programs of tests/programs, on CPU devices."""

import re
from pathlib import Path

from jax_ep.testing import launch

_PROGRAMS = Path(__file__).parent / "programs"


def path_of(name):
    return str(_PROGRAMS / f"{name}.py")


def has_passed(output):
    """Whether a program said so. JAX may log behind it that another process has ended."""
    return "passed" in output.splitlines()


def number_behind(word, output):
    """Returns the number that a program printed after a word, at the end of a line."""
    found = re.search(rf"{word} ([\d.]+)\n", output)
    assert found is not None, output
    return float(found[1])


def run_on_cpus(program, *argv, processes=2, devices=2, deadline=240.0, exit_codes=None):
    return launch.launch(
        [path_of(program), *argv],
        num_processes=processes,
        num_devices=devices,
        deadline=deadline,
        environment={"JAX_PLATFORMS": "cpu"},
        exit_codes=exit_codes,
    )
