"""The end of a process that has lost a peer, or that still holds groups."""

import subprocess
import sys

import pytest

LEAVES = """
import atexit, sys
from jax_ep._src.base import native_modules
atexit.register(print, "at exit")
native_modules.load("cpu").exit_without_teardown()
print("said", end=" ")
"""


@pytest.mark.parametrize(
    ("last", "code"), [("", 0), ("sys.exit(7)", 7), ("raise ValueError('not today')", 1)]
)
def test_an_exit_without_teardown_keeps_exit_code_and_output(last, code):
    done = subprocess.run(
        [sys.executable, "-c", LEAVES + last], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (code, "said at exit\n")
    assert ("ValueError: not today" in done.stderr) == (code == 1)


STUCK = """
import sys, threading
import jax
from jax._src import dispatch
from jax_ep._src.base import jax_compat
from jax_ep._src.base import native_modules

class Never:
    def block_until_ready(self):
        threading.Event().wait()

jax.numpy.ones(3).block_until_ready()
dispatch.runtime_tokens.set_output_runtime_token(jax.devices()[0], Never())
native_modules.load("cpu").exit_without_teardown()
jax_compat.abandon_runtime()
sys.exit(7)
"""


def test_effects_of_a_step_that_never_ends_are_not_waited_for():
    """A jax.debug.print beside an NCCL psum whose peer has gone has such effects."""
    done = subprocess.run([sys.executable, "-c", STUCK], timeout=60, check=False)
    assert done.returncode == 7


KEEPS = """
import copy, dataclasses, sys
import jax, numpy as np, jax_ep
from jax_ep.testing import virtual_devices
from jax_ep.testing.ranks import make_mesh, on_ranks
virtual_devices()

@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Model:
    weights: jax.Array
    group: jax_ep.Group = dataclasses.field(metadata={"static": True})

x, ids = np.ones((2, 4, 8), np.float32), np.zeros((2, 4, 1), np.int32)

def send(x, ids):
    return jax_ep.dispatch(x, ids, group=model.group, num_experts=2)
"""
# Objects that such a script still holds when it ends.
HELD = {
    "open": "model = Model(x, jax_ep.Group.open(make_mesh(2), 'ep'))",
    "got": "model = Model(x, jax_ep.Group.get(make_mesh(2), 'ep'))",
    "closed": """
with jax_ep.Group.open(make_mesh(2), "ep") as group:
    model = Model(x, group)
""",
    "compiled": """
model = Model(x, jax_ep.Group.open(make_mesh(2), "ep"))
step = on_ranks(send, model.group.mesh)
out = step(x, ids)
again = copy.deepcopy(out.handle)
""",
    "opened again": """
first = Model(x, jax_ep.Group.open(make_mesh(2), "ep"))
first.group.close()
model = Model(x, jax_ep.Group.open(make_mesh(2), "ep"))
on_ranks(send, model.group.mesh)(x, ids)
""",
    "a thread": """
import threading, time
model = Model(x, jax_ep.Group.open(make_mesh(2), "ep"))
def watch(group):
    while True:
        group.check()
        time.sleep(0.001)
threading.Thread(target=watch, args=(model.group,), daemon=True).start()
""",
    "a failure": """
model = Model(x, jax_ep.Group.open(make_mesh(2), "ep", timeout=0.2))
model.group._native_group.handle.skip_rank(1)
try:
    model.group.check(on_ranks(send, model.group.mesh)(x, ids))
except jax_ep.PeerTimeoutError as e:
    told = e
""",
}


@pytest.mark.parametrize("held", HELD)
def test_a_script_whose_classes_jax_keeps_ends_without_output(held):
    """JAX's registry of pytrees keeps the script's classes, which keep the script's variables."""
    done = subprocess.run(
        [sys.executable, "-c", KEEPS + HELD[held] + "\nprint('end')"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", "")
