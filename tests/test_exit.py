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


STUCK = """
import sys, threading
import jax
from jax._src import dispatch
from jax_ep import _jax_compat, _native

class Never:
    def block_until_ready(self):
        threading.Event().wait()

jax.numpy.ones(3).block_until_ready()
dispatch.runtime_tokens.set_output_runtime_token(jax.devices()[0], Never())
_native.load("cpu").exit_without_teardown()
_jax_compat.abandon_runtime()
sys.exit(7)
"""


def test_effects_of_a_step_that_never_ends_are_not_waited_for():
    """As of jax.debug.print beside a psum of NCCL's, whose peer has gone."""
    done = subprocess.run([sys.executable, "-c", STUCK], timeout=60, check=False)
    assert done.returncode == 7
