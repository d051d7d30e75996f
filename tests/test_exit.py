"""How a process ends that has lost a peer."""

import subprocess
import sys

import pytest

LEAVES = """
import atexit, sys
from jax_ep import _native
atexit.register(print, "at exit")
_native.load("cpu").exit_without_teardown()
print("said", end=" ")
"""


@pytest.mark.parametrize(
    ("last", "code"), [("", 0), ("sys.exit(7)", 7), ("raise ValueError('not today')", 1)]
)
def test_an_exit_without_teardown_keeps_the_code_and_what_was_said(last, code):
    done = subprocess.run(
        [sys.executable, "-c", LEAVES + last], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (code, "said at exit\n")
    assert ("ValueError: not today" in done.stderr) == (code == 1)
