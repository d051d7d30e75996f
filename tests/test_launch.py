"""launch: programs of several processes that succeed, fail or hang."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jax_ep._src.base.errors import ConfigError, LaunchError
from jax_ep.testing import launch

CPU = {"JAX_PLATFORMS": "cpu"}

PSUM = """
import jax, numpy as np
from jax.sharding import PartitionSpec as P
from jax_ep.testing import launch
from jax_ep.testing.compare import assert_same_bits, shards
from jax_ep.testing.ranks import make_mesh, on_ranks, place
launch.initialize()
assert (jax.process_count(), len(jax.local_devices())) == (2, 2)
mesh = make_mesh(4)
x = np.arange(12, dtype=np.float32).reshape(4, 3)
total = on_ranks(lambda x: jax.lax.psum(x, "ep"), mesh, check_vma=False)(place(x, mesh))
assert len(list(shards(total))) == 2
assert_same_bits(total, np.tile(x.sum(0), (4, 1)))
try:
    assert_same_bits(total, np.where(np.arange(4)[:, None] == 3, 0, x.sum(0)).astype(np.float32))
except AssertionError as error:
    print("process", jax.process_index(), "saw", error)
print("process", jax.process_index(), "is done")
"""


def test_processes_find_each_other():
    """Each process compares its own shards, so only the last process sees the wrong last row."""
    first, second = launch.launch(
        ["-c", PSUM], num_processes=2, num_devices=2, deadline=120, environment=CPU
    )
    assert "process 0 is done" in first
    assert "saw" not in first
    assert "process 1 saw arrays: 3 of 3 values differ, first at (3, 0)" in second


LAUNCHER = """
import sys
from jax_ep.testing import launch
code = "import os, time; print(os.getpid(), file=open(f'{os.getpid()}.pid', 'w')); time.sleep(100)"
launch.launch(["-c", code], num_processes=2, deadline=90)
"""


def test_nothing_outlives_a_terminated_launcher(tmp_path):
    launcher = subprocess.Popen([sys.executable, "-c", LAUNCHER], cwd=tmp_path)
    deadline = time.monotonic() + 60
    while len(pids := [int(p.stem) for p in tmp_path.glob("*.pid")]) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    launcher.terminate()
    assert launcher.wait(20) == 128 + signal.SIGTERM
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_process_that_fails_ends_all():
    code = """
import os, time
if os.environ["JAX_EP_PROCESS_ID"] == "1":
    print("about to fail", flush=True)
    raise SystemExit(7)
print("waits for ever", flush=True)
time.sleep(1000)
"""
    start = time.monotonic()
    with pytest.raises(LaunchError) as caught:
        launch.launch(["-c", code], num_processes=3, deadline=100)
    assert time.monotonic() - start < 20
    message = str(caught.value)
    assert message.startswith("launch: process 1 ended with code 7\n")
    assert "--- process 1: exit code 7\nabout to fail" in message
    assert message.count("killed by launch") == 2


def _ends(pid):
    """Returns whether a process ends within seconds; a zombie that nobody collects has ended."""
    for _ in range(100):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


HANG = """
import os, subprocess, sys, threading, time
def waits_for_its_peer():
    time.sleep(1000)
if os.environ["JAX_EP_PROCESS_ID"] == "1":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    print("child", child.pid, "of", os.environ["JAX_EP_NUM_PROCESSES"], flush=True)
    threading.Thread(target=waits_for_its_peer).start()
    waits_for_its_peer()
print("has ended")
"""


def test_a_process_that_hangs_shows_where():
    """The output has tracebacks of all of its threads, and its children end with it."""
    with pytest.raises(LaunchError) as caught:
        launch.launch(["-c", HANG], num_processes=2, deadline=2)
    message = str(caught.value)
    assert message.startswith("launch: processes 1 did not end within 2 s\n")
    assert "--- process 0: exit code 0\nhas ended" in message
    assert "--- process 1: killed by launch\nchild" in message
    assert message.count("in waits_for_its_peer") >= 2
    child = int(message.partition("\nchild ")[2].split()[0])
    assert _ends(child)


def test_children_that_are_left_behind_end_too():
    code = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
print(child.pid)
"""
    (output,) = launch.launch(["-c", code], num_processes=1, deadline=60)
    assert _ends(int(output))


def test_initialize_outside_of_a_launch_is_refused():
    with pytest.raises(ConfigError, match=r"JAX_EP_COORDINATOR, .* must be set"):
        launch.initialize()


def test_launch_counts_the_visible_gpus(monkeypatch, tmp_path):
    tool = tmp_path / "nvidia-smi"
    tool.write_text('#!/bin/sh\nfor i in 0 1 2 3; do echo "GPU $i: X (UUID: GPU-$i)"; done\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert launch.count_gpus() == 4
    for visible, expected in (("2,3", 2), ("", 0), ("0,1,2,3,4", 4)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert launch.count_gpus() == expected
    tool.unlink()
    assert launch.count_gpus() == 0
