"""Tests of the native parts without XLA and Python, plain and with sanitizers."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SANITIZE = Path(__file__).parent.parent / "tools" / "sanitize"
CHECKS = [
    "native-plain",
    pytest.param("native-thread", marks=pytest.mark.slow),
    pytest.param("native-address", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("check", CHECKS)
def test_native_tests_pass(check):
    compiler = shlex.split(os.environ.get("CXX") or "g++")[0]
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed")
    done = subprocess.run(
        [sys.executable, SANITIZE, check],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    assert done.returncode == 0, done.stdout
