"""The end of a process that has lost a peer, or that still holds groups."""

import subprocess
import sys

import pytest
from process_programs import path_of

pytestmark = pytest.mark.dealt


@pytest.mark.parametrize(("last", "code"), [("ends", 0), ("exits", 7), ("raises", 1)])
def test_an_exit_without_teardown_keeps_exit_code_and_output(last, code):
    done = subprocess.run(
        [sys.executable, path_of("exits_without_teardown"), last],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (code, "said at exit\n")
    assert ("ValueError: not today" in done.stderr) == (code == 1)


def test_effects_of_a_step_that_never_ends_are_not_waited_for():
    """A jax.debug.print beside an NCCL psum whose peer has gone has such effects."""
    done = subprocess.run([sys.executable, path_of("exits_amid_a_step")], timeout=60, check=False)
    assert done.returncode == 7


# Objects that such a script still holds when it ends.
HELD = ["open", "got", "closed", "compiled", "opened again", "a thread", "a failure"]


@pytest.mark.parametrize("held", HELD)
def test_a_script_whose_classes_jax_keeps_ends_without_output(held):
    """JAX's registry of pytrees keeps the script's classes, which keep the script's variables."""
    done = subprocess.run(
        [sys.executable, path_of("held_at_exit"), held],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", "")
