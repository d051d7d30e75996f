"""`python -m jax_ep info`: its output, and the problems that it sees on each machine."""

import argparse
import json
import re
import subprocess
import sys
from dataclasses import replace

import pytest

from jax_ep._src.base import native_modules
from jax_ep._src.base.errors import GroupError
from jax_ep.testing import doctor

BUILT = {"operations": ["dispatch"], "build": "b", "compilers": {"C++": "c"}, "ffi_api": "0.3"}
NOT_BUILT = {"missing": "was not built: there was no CUDA compiler"}
CPUS = doctor.Findings(
    versions={"jax": "0"},
    modules={"cpu": BUILT, "cuda": NOT_BUILT},
    num_gpus=0,
    has_compiler=False,
    has_plugin=False,
    platform="cpu",
    num_devices=8,
    group={"backend": "cpu", "backends": {"cuda": "the mesh's devices are not GPUs"}},
)
GPUS = replace(
    CPUS,
    modules={"cpu": BUILT, "cuda": BUILT},
    num_gpus=2,
    has_plugin=True,
    platform="gpu",
    num_devices=2,
    group={"backend": "cuda", "backends": {"cuda": "usable"}},
)


def _stock(reason):
    return {"backend": "xla", "backends": {"cuda": reason}}


@pytest.mark.parametrize("machine", [CPUS, GPUS], ids=["cpus", "gpus"])
def test_machine_that_lacks_nothing_has_no_problem(machine):
    assert list(machine.problems()) == []


PROBLEMS = {
    "no CPU module": (
        replace(CPUS, modules={"cpu": {"missing": "was not built"}, "cuda": NOT_BUILT}),
        "the CPU module was not built",
        "install g++",
    ),
    "GPUs, but no CUDA module and no compiler": (
        replace(GPUS, modules=CPUS.modules, group=_stock("not built")),
        "the CUDA module was not built",
        "install a CUDA 13 compiler",
    ),
    "GPUs and a compiler, but no CUDA module": (
        replace(GPUS, modules=CPUS.modules, has_compiler=True, group=_stock("not built")),
        "the CUDA module was not built",
        "install jax_ep again with JAX_EP_CUDA=ON set",
    ),
    "GPUs, but JAX for CPUs": (
        replace(CPUS, modules=GPUS.modules, num_gpus=2),
        "JAX does not use the 2 NVIDIA GPUs",
        "pip install 'jax[cuda13]'",
    ),
    "GPUs that JAX's wheels cannot use": (
        replace(CPUS, modules=GPUS.modules, num_gpus=2, has_plugin=True),
        "JAX does not use the 2 NVIDIA GPUs",
        "start JAX with JAX_PLATFORMS=cuda",
    ),
    "no group": (
        replace(CPUS, group=None, failure="self-test: rank 3 is wrong"),
        "no group opens over all devices: self-test: rank 3 is wrong",
        "run python -m jax_ep conformance",
    ),
    "module of another version": (
        replace(CPUS, group=None, failure="TypeError: open_group()", is_mismatched=True),
        "no group opens over all devices: TypeError: open_group()",
        "install jax_ep again",
    ),
    "too many GPUs": (
        replace(GPUS, num_devices=40, group=_stock("at most 32 ranks")),
        "the CUDA kernels do not run here: at most 32 ranks",
        "at most 32 GPUs",
    ),
    "GPUs that do not reach one another": (
        replace(GPUS, group=_stock("GPU 0 cannot read GPU 1")),
        "GPU 0 cannot read GPU 1",
        "reach one another's memory",
    ),
}


def test_module_of_another_version_is_found(monkeypatch):
    """The native code of an editable installation may not have been compiled again."""

    def open_group(identity):
        raise AssertionError(identity)

    module = native_modules.load("cpu")
    monkeypatch.setattr(module, "open_group", open_group)
    (problem,) = doctor.examine().problems()
    assert "TypeError" in problem.what
    assert problem.remedy.startswith("install jax_ep again")


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_problem_is_printed_with_its_remedy(name):
    machine, what, remedy = PROBLEMS[name]
    (problem,) = machine.problems()
    assert what in problem.what
    assert remedy in problem.remedy


def test_flag_that_keeps_kernels_apart_is_named(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_command_buffer_scheduling_mode=concurrent")
    (problem,) = replace(GPUS, group=_stock("concurrent needs one order")).problems()
    assert problem.remedy == "take the flag that the reason names out of XLA_FLAGS"


def test_command_prints_what_is_here_and_succeeds():
    """A user's command succeeds: machines of these tests can use everything that they have."""
    command = [sys.executable, "-m", "jax_ep", "info"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    ops = (
        "all_reduce, all_reduce_residual_rmsnorm, combine, combine_recv, combine_send, "
        "dispatch, dispatch_recv, dispatch_send, get_dispatch_layout, "
        "pull_rows, ragged_all_to_all, read_clock"
    )
    assert f"cpu module: {ops};" in done.stdout
    assert re.search(r"^  C\+\+ compiler: \w+ \d+\.\d+", done.stdout, re.MULTILINE)
    assert ("  CUDA compiler: " in done.stdout) != ("cuda module was not built" in done.stdout)
    assert "back end 'cpu', self-test passed" in done.stdout
    assert "rank 7:" in done.stdout
    assert done.stdout.endswith("everything this machine could use is usable\n")


def test_json_holds_the_facts_of_the_text(monkeypatch, capsys):
    """JSON holds the problem that makes the command fail: a CPU module that cannot be loaded."""

    def load(name):
        raise GroupError(f"back end {name!r}: its native module was not built")

    monkeypatch.setattr(native_modules, "load", load)
    assert doctor.main(argparse.Namespace(json=True)) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["modules"]["cpu"] == {"missing": "was not built"}
    assert found["group"]["backend"] == "xla"
    assert found["group"]["num_ranks"] == found["num_devices"] == 8
    assert [problem["what"] for problem in found["problems"]] == ["the CPU module was not built"]
    assert doctor.main(argparse.Namespace(json=False)) == 1
    text = capsys.readouterr().out
    assert "cpu module was not built\n" in text
    assert "PROBLEM: the CPU module was not built\n  what to do: install g++" in text
