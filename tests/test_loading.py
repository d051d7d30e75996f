"""Executables that are loaded in a process that has opened no group."""

import re
import subprocess
import sys

import pytest
from process_programs import path_of

pytestmark = pytest.mark.dealt


def _run(*argv):
    done = subprocess.run(
        [sys.executable, *map(str, argv)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("how", ["export", "serialized"])
def test_an_executable_names_the_group_that_it_wants(tmp_path, how):
    identity = _run(path_of("write_an_executable"), tmp_path / "file", how).strip()
    said = _run(path_of("load_an_executable"), tmp_path / "file", how)
    assert re.search(rf"jax_ep: group {identity} is not open", said)


def test_import_makes_no_backend():
    code = "import jax_ep; from jax._src import xla_bridge; print(len(xla_bridge._backends))"
    assert _run("-c", code).strip() == "0"


def test_a_module_that_cannot_be_registered_leaves_jax_alone():
    first, second = _run(path_of("without_native_module")).splitlines()
    assert first == "3"
    assert second.startswith("xla back end 'cpu': its native module was not built")
