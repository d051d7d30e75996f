"""The examples run, from their command lines, at a small size."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
SMALL = ["--steps", "2", "--batch", "8", "--seq", "16", "--d-model", "16", "--layers", "1"]


def _run(tmp_path, *flags):
    command = [sys.executable, EXAMPLES / "train_moe.py", *SMALL, "--out", tmp_path, *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)


@pytest.mark.parametrize("devices", ["8", "3"])
def test_train_moe(tmp_path, devices):
    flags = [] if devices == "8" else ["--devices", "3", "--experts", "6", "--batch", "9"]
    done = _run(tmp_path, *flags, "--expert-parallel", "4" if devices == "8" else "3")
    assert done.returncode == 0, done.stdout + done.stderr
    for text in ("bits/byte", "of rows dropped"):
        assert text in done.stderr
    for text in ("unigram entropy", "bigram entropy", "held-out loss", "--- sampled"):
        assert text in done.stdout
    assert (tmp_path / "train_moe.png").read_bytes().startswith(b"\x89PNG")


def test_train_moe_compare(tmp_path):
    """Both back ends train the same steps to the same bits."""
    done = _run(tmp_path, "--compare", "xla", "--backend", "cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "cpu against xla, 2 steps" in done.stdout
    assert "losses 0 bits per byte, parameters 0\n" in done.stdout


def test_train_moe_refuses_impossible_sizes(tmp_path):
    done = _run(tmp_path, "--devices", "3")
    assert done.returncode == 1
    assert "must divide --devices 3" in done.stderr
