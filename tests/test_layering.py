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
    {"errors", "config"},
    {"_jax_compat", "_registry", "_sockets", "_spec", "_tuning", "reference", "capacity"},
    {"_bootstrap", "_native", "_primitives"},
    {"_native_group", "_xla", "_xla_reduce", "handle", "fp8"},
    {"_backends"},
    {"_self_test"},
    {"group"},
    {"_checks"},
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
    {"run"},
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


OPERATIONS = ["dispatch", "dispatch_fp8", "combine", "combine_weights", "get_dispatch_layout"]


@pytest.mark.parametrize("name", OPERATIONS)
def test_docstrings_of_operations_are_complete(name):
    doc = inspect.getdoc(getattr(jax_ep, name))
    for part in ("Args:", "Returns:", "Collective:", "Gradient:", "Raises:", "Source:"):
        assert part in doc, f"{name}: {part}"


def test_one_op_one_stem():
    """Public module, primitive, native folder and test of each operation share its name."""
    ffi = Path(__file__).parent.parent / "xla_ffi" / "ops"
    for stem in ("dispatch", "combine", "get_dispatch_layout", "pull_rows"):
        assert (PACKAGE / f"{stem}.py").exists() == (stem != "pull_rows")  # not public
        assert (PACKAGE / "_primitives" / f"{stem}.py").exists()
        assert (Path(__file__).parent / f"test_{stem}.py").exists()
        for suffix in (".h", "_ffi.h", "_cpu.cc", "_cuda.cu"):
            assert (ffi / stem / f"{stem}{suffix}").exists()


NATIVE = Path(__file__).parent.parent / "xla_ffi"
# What a folder's files may include, besides the standard library.
MAY_INCLUDE = {
    "core": {"core"},
    "runtime": {"core", "runtime", "sys", "poll.h", "unistd.h"},
    "device": {
        "core",
        "runtime",
        "device",
        "cuda.h",
        "cuda_bf16.h",
        "cuda_fp16.h",
        "cuda_runtime.h",
        "cuda_runtime_api.h",
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
