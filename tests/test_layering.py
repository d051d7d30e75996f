"""The shape of the code: imports go downwards, private names of JAX stay in one file."""

import ast
import inspect
from pathlib import Path

import pytest

import jax_ep

PACKAGE = Path(jax_ep.__file__).parent

# A module may import from its own layer and from those below it.
LAYERS = [
    {"errors", "config"},
    {"_jax_compat", "_registry", "_spec", "reference", "capacity"},
    {"_native", "_primitives"},
    {"_xla", "handle", "fp8"},
    {"_backends"},
    {"_self_test"},
    {"group"},
    {"_checks"},
    {"_differentiable"},
    {"dispatch", "get_dispatch_layout"},
    {"combine", "dispatch_fp8"},
    {"testing", "__init__", "__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
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
        private = ("jax._src", "jax.extend", "jax.interpreters", "jax.core")
        if name.startswith(private):
            assert own == "_jax_compat", f"{own} imports {name}"


@pytest.mark.parametrize("name", ["dispatch", "combine", "get_dispatch_layout"])
def test_docstrings_of_operations_are_complete(name):
    doc = inspect.getdoc(getattr(jax_ep, name))
    for part in ("Args:", "Returns:", "Collective:", "Gradient:", "Raises:", "Source:"):
        assert part in doc, f"{name}: {part}"


def test_one_op_one_stem():
    """Public module, primitive, native folder and test of each operation share its name."""
    ffi = Path(__file__).parent.parent / "xla_ffi" / "ops"
    for stem in ("dispatch", "combine", "get_dispatch_layout"):
        assert (PACKAGE / f"{stem}.py").exists()
        assert (PACKAGE / "_primitives" / f"{stem}.py").exists()
        assert (Path(__file__).parent / f"test_{stem}.py").exists()
        for suffix in (".h", "_ffi.h", "_cpu.cc"):
            assert (ffi / stem / f"{stem}{suffix}").exists()
