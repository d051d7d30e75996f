"""launch: programs of several processes that succeed, fail or hang."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from process_programs import path_of

from jax_ep._src.base.errors import ConfigError, LaunchError
from jax_ep.testing import launch

pytestmark = pytest.mark.dealt

CPU = {"JAX_PLATFORMS": "cpu"}


def test_processes_find_each_other():
    """Each process compares its own shards, so only the last process sees the wrong last row."""
    first, second = launch.launch(
        [path_of("psum")], num_processes=2, num_devices=2, deadline=120, environment=CPU
    )
    assert "process 0 is done" in first
    assert "saw" not in first
    assert "process 1 saw arrays: 3 of 3 values differ, first at (3, 0)" in second


def test_nothing_outlives_a_terminated_launcher(tmp_path):
    launcher = subprocess.Popen([sys.executable, path_of("launcher")], cwd=tmp_path)
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
    start = time.monotonic()
    with pytest.raises(LaunchError) as caught:
        launch.launch([path_of("fails_beside_a_waiter")], num_processes=3, deadline=100)
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


def test_a_process_that_hangs_shows_where():
    """The output has tracebacks of all of its threads, and its children end with it."""
    with pytest.raises(LaunchError) as caught:
        launch.launch([path_of("hang")], num_processes=2, deadline=2)
    message = str(caught.value)
    assert message.startswith("launch: processes 1 did not end within 2 s\n")
    assert "--- process 0: exit code 0\nhas ended" in message
    assert "--- process 1: killed by launch\nchild" in message
    assert message.count("in waits_for_its_peer") >= 2
    child = int(message.partition("\nchild ")[2].split()[0])
    assert _ends(child)


def test_children_that_are_left_behind_end_too():
    (output,) = launch.launch([path_of("leaves_a_child")], num_processes=1, deadline=60)
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
