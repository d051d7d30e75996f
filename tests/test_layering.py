"""The shape of the code: imports go downwards, private names of JAX stay in one file."""

import graphlib
import inspect
import re
from pathlib import Path

import pytest
from import_graph import (
    FLOORS,
    MODULES,
    PACKAGE,
    PARTS,
    PICTURE,
    draw,
    modules_imported,
    names_imported,
    part_of,
)

import jax_ep
from jax_ep._src.base import operations


def test_every_module_has_a_part():
    without = {m for m in MODULES if part_of(m) is None}
    assert without == {"__init__", "_src"}
    assert {p.name for p in (PACKAGE / "_src").iterdir() if (p / "__init__.py").exists()} == set(
        FLOORS
    )


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_go_downwards(module):
    own = part_of(module)
    for found in modules_imported(module):
        if own is not None:
            assert PARTS.index(part_of(found)) <= PARTS.index(own), f"{module} imports {found}"


def test_the_picture_of_the_architecture_shows_the_imports():
    assert PICTURE.read_text() == draw()


def test_modules_do_not_import_in_circles():
    graphlib.TopologicalSorter({m: modules_imported(m) for m in MODULES}).prepare()


@pytest.mark.parametrize("module", sorted(MODULES))
def test_private_names_of_jax_stay_in_one_file(module):
    for name in names_imported(module):
        assert name.split(".")[0] not in ("pytest", "hypothesis"), f"{module} imports {name}"
        if name.startswith(("jax._src", "jax.extend", "jax.interpreters", "jax.core")):
            assert module == "_src.base.jax_compat", f"{module} imports {name}"


def test_public_names_are_those_in_all():
    visible = {name for name in dir(jax_ep) if not name.startswith("_")}
    assert visible - {"bench", "compat", "reference", "testing"} == set(jax_ep.__all__)
    for name in jax_ep.__all__:
        assert getattr(jax_ep, name).__module__ == "jax_ep"


# Public functions that are not operations on arrays.
HELPERS = {
    "overlap": "computes what its caller's function does",
    "export_safety_checks": "a list for jax.export",
    "in_flight_bytes": "computes a number",
    "low_latency_bytes": "computes a number",
    "recv_capacity": "computes a number",
    "save_communication_policy": "a policy for jax.checkpoint",
}
FUNCTIONS = {name for name, value in vars(jax_ep).items() if inspect.isfunction(value)}
OPERATIONS = sorted(FUNCTIONS - set(HELPERS))


def test_helpers_are_public_functions():
    assert set(HELPERS) <= FUNCTIONS


@pytest.mark.parametrize("name", OPERATIONS)
def test_docstrings_of_operations_are_complete(name):
    doc = inspect.getdoc(getattr(jax_ep, name)) or ""
    for part in ("Args:", "Returns:", "Collective:", "Gradient:", "Raises:", "Source:"):
        assert part in doc, f"{name}: {part}"


# Operations that share the folder of another one.
STEMLESS = {
    "all_gather": "the kernels of all_reduce, without the sum",
    "all_to_all_v": "ragged_all_to_all, with pieces side by side",
    "combine_weights": "combine in the rank layout, pull_rows in the other",
    "dequantize_fp8": "plain JAX",
    "dispatch_fp8": "dispatch between quantize_fp8 and dequantize_fp8",
    "low_latency_combine": "combine, by its kernels for few tokens",
    "low_latency_combine_recv": "the second half of low_latency_combine",
    "low_latency_combine_send": "the first half of low_latency_combine",
    "low_latency_dispatch": "dispatch, by its kernels for few tokens",
    "low_latency_dispatch_recv": "the second half of low_latency_dispatch",
    "low_latency_dispatch_send": "the first half of low_latency_dispatch",
    "quantize_fp8": "plain JAX",
    "reduce_scatter": "the kernels of all_reduce, which keep a part",
}
NOT_PUBLIC = {"pull_rows"}  # gradients and handles use it
MEASURING = {"read_clock"}  # native alone; jax_ep.testing.clock calls it
NO_GRADIENT = {"get_dispatch_layout"}
TESTED_ELSEWHERE = {"all_reduce_residual_rmsnorm"}  # with the sum, in test_all_reduce.py
SHARED = {"common", "two_levels"}  # parts of several operations
STEMS = sorted(set(OPERATIONS) - set(STEMLESS) | NOT_PUBLIC)
TESTS = Path(__file__).parent
NATIVE_OPS = TESTS.parent / "xla_ffi" / "ops"
OPS = PACKAGE / "_src" / "ops"


@pytest.mark.parametrize("stem", STEMS)
def test_an_operation_has_one_stem_everywhere(stem):
    """The Python folder, the native folder and the test of each operation share its name."""
    files = {"call", "stock"}
    if stem not in NOT_PUBLIC:
        files.add("api")
        assert inspect.getsourcefile(getattr(jax_ep, stem)) == str(OPS / stem / "api.py")
    if stem not in NO_GRADIENT:
        files.add("vjp")
    assert files <= {path.stem for path in (OPS / stem).glob("*.py")}
    assert (TESTS / f"test_{stem}.py").exists() == (stem not in TESTED_ELSEWHERE)
    for suffix in (".h", "_ffi.h", "_cpu.cc", "_cuda.cu"):
        assert (NATIVE_OPS / stem / f"{stem}{suffix}").exists()


def test_every_folder_is_an_operation():
    for folder in (OPS, NATIVE_OPS):
        names = {p.name for p in folder.iterdir() if p.is_dir() and p.name != "__pycache__"}
        assert names - SHARED == {*STEMS, *(MEASURING if folder == NATIVE_OPS else ())}
    assert set(STEMLESS) <= set(OPERATIONS)
    plain = {"quantize_fp8", "dequantize_fp8"}
    assert {op.name for op in operations.OPERATIONS} == set(OPERATIONS) - plain


NATIVE = Path(__file__).parent.parent / "xla_ffi"
# Headers and folders that each folder's files may include, besides the standard library.
MAY_INCLUDE = {
    "core": {"core"},
    "runtime": {
        "core",
        "runtime",
        "sys",
        "poll.h",
        "pthread.h",
        "semaphore.h",
        "signal.h",
        "unistd.h",
    },
    "device": {
        "core",
        "runtime",
        "device",
        "cuda.h",
        "cuda_bf16.h",
        "cuda_fp16.h",
        "cuda_fp8.h",
        "cuda_runtime.h",
        "cuda_runtime_api.h",
        "fcntl.h",
        "unistd.h",
    },
}


@pytest.mark.parametrize("folder", MAY_INCLUDE)
def test_native_includes_go_downwards(folder):
    """core and runtime know neither XLA, nor CUDA, nor Python; device knows CUDA alone."""
    for path in (NATIVE / folder).iterdir():
        for name in re.findall(r'#include [<"](.*?)[>"]', path.read_text()):
            is_standard = "/" not in name and not name.endswith((".h", ".cuh"))
            assert is_standard or name.split("/")[0] in MAY_INCLUDE[folder], f"{path}: {name}"
