"""The shape of the code: imports go downwards, private names of JAX stay in one file."""

import ast
import inspect
import re
from pathlib import Path

import pytest

import jax_ep

PACKAGE = Path(jax_ep.__file__).parent

# A module may import from its own layer and from those below it.
LAYERS = [
    {"_exact", "errors", "config"},
    {
        "_drain",
        "_jax_compat",
        "_neighbourhoods",
        "_registry",
        "_settle",
        "_sockets",
        "_spec",
        "_tuning",
        "reference",
    },
    {
        "_bootstrap",
        "_conversation",
        "_leaving",
        "_shard_map",
        "_native",
        "_open_arguments",
        "_primitives",
    },
    {"_interrupts", "_native_group", "_xla", "_xla_reduce", "handle"},
    {"_backends"},
    {"_failures", "_group_info", "_lookup", "_self_test", "_settings"},
    {"group"},
    {"_checks"},
    {"capacity", "fp8"},
    {"_differentiable", "_reduce"},
    {"dispatch", "get_dispatch_layout", "all_reduce", "all_reduce_residual_rmsnorm"},
    {"beside", "combine", "dispatch_fp8", "transforms"},
    {"testing"},
    {"bench"},
    {"__init__", "__main__"},
]
# The same inside jax_ep.testing, except that `import jax_ep` is free.
TESTING_LAYERS = [
    {"compare", "routing", "launch"},
    {"ranks"},
    {"cases"},
    {"conformance"},
    {"doctor", "run"},
    {"__init__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
TESTING_LEVEL = {name: level for level, names in enumerate(TESTING_LAYERS) for name in names}
SOURCES = sorted(PACKAGE.rglob("*.py"))


def _imports(path):
    tree = ast.parse(path.read_text())
    typing_only = {
        node
        for test in ast.walk(tree)
        if isinstance(test, ast.If) and ast.unparse(test.test) == "TYPE_CHECKING"
        for node in ast.walk(test)
    }
    for node in ast.walk(tree):
        if node in typing_only:
            continue
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                yield f"{node.module}.{alias.name}"
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_downwards(path):
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for name in _imports(path):
        parts = name.split(".")
        if parts[0] == "jax_ep" and len(parts) > 1:
            level = LEVEL.get(parts[1], LEVEL["__init__"])
            assert level <= LEVEL[own], f"{own} imports {name}"
            if parts[1] == own == "testing":
                inner = path.relative_to(PACKAGE).parts[1].removesuffix(".py")
                level = TESTING_LEVEL.get(parts[2], TESTING_LEVEL["__init__"])
                assert level <= TESTING_LEVEL[inner], f"testing/{inner} imports {name}"
        assert parts[0] not in ("pytest", "hypothesis"), f"{own} imports {name}"
        private = ("jax._src", "jax.extend", "jax.interpreters", "jax.core")
        if name.startswith(private):
            assert own == "_jax_compat", f"{own} imports {name}"


# Public functions that are no operations on arrays.
HELPERS = {
    "beside": "computes what its caller's function does",
    "export_safety_checks": "a list for jax.export",
    "recv_capacity": "computes a number",
    "save_communication_policy": "a policy for jax.checkpoint",
}
FUNCTIONS = {name for name, value in vars(jax_ep).items() if inspect.isfunction(value)}
OPERATIONS = sorted(FUNCTIONS - set(HELPERS))


def test_helpers_are_public_functions():
    assert set(HELPERS) <= FUNCTIONS


@pytest.mark.parametrize("name", OPERATIONS)
def test_docstrings_of_operations_are_complete(name):
    doc = inspect.getdoc(getattr(jax_ep, name))
    for part in ("Args:", "Returns:", "Collective:", "Gradient:", "Raises:", "Source:"):
        assert part in doc, f"{name}: {part}"


# Operations without a stem of their own.
STEMLESS = {
    "all_gather": "the kernels of all_reduce, without the sum",
    "combine_weights": "combine in the rank layout, pull_rows in the other",
    "dequantize_fp8": "plain JAX",
    "dispatch_fp8": "dispatch between quantize_fp8 and dequantize_fp8",
    "quantize_fp8": "plain JAX",
    "reduce_scatter": "the kernels of all_reduce, which keep a part",
}
# Stems that lack a file.
NOT_PUBLIC = {"pull_rows"}  # what gradients and handles need
TESTED_ELSEWHERE = {"all_reduce_residual_rmsnorm"}  # beside the sum, in test_all_reduce.py
NOT_NATIVE = {"check_mesh", "without_tangent"}  # identities
STEMS = sorted(set(OPERATIONS) - set(STEMLESS) | NOT_PUBLIC)
TESTS = Path(__file__).parent
OPS = TESTS.parent / "xla_ffi" / "ops"


@pytest.mark.parametrize("stem", STEMS)
def test_one_op_one_stem(stem):
    """Public module, primitive, native folder and test of each operation share its name."""
    if stem not in NOT_PUBLIC:
        assert getattr(jax_ep, stem).__module__ == f"jax_ep.{stem}"
    assert (TESTS / f"test_{stem}.py").exists() == (stem not in TESTED_ELSEWHERE)
    for suffix in (".h", "_ffi.h", "_cpu.cc", "_cuda.cu"):
        assert (OPS / stem / f"{stem}{suffix}").exists()


def test_every_primitive_has_a_stem():
    primitives = {p.stem for p in (PACKAGE / "_primitives").glob("*.py") if p.stem[0] != "_"}
    assert sorted(primitives - NOT_NATIVE) == STEMS
    assert sorted(p.name for p in OPS.iterdir() if p.is_dir()) == STEMS
    assert set(STEMLESS) <= set(OPERATIONS)


NATIVE = Path(__file__).parent.parent / "xla_ffi"
# What a folder's files may include, besides the standard library.
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
