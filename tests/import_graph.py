"""The imports between the modules of jax_ep. As a program it draws the folders, as Mermaid text."""

import ast
from collections.abc import Iterator
from pathlib import Path

import jax_ep

PACKAGE = Path(jax_ep.__file__).parent
FLOORS = ("base", "processes", "group", "ops", "opening")  # of jax_ep/_src, the lowest first
# A part may import from itself and from the parts before it; `import jax_ep` is free.
PARTS = (*(f"_src.{floor}" for floor in FLOORS), "reference", "testing", "bench", "__main__")
# The bodies of Group.open and Group.get use operations, which use Group: they are imported late.
ARROWS_BACK = {("_src.group.group", "_src.opening.open")}


def _name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


# By name, as in `_src.base.spec`.
MODULES = {_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def part_of(module: str) -> str | None:
    """The part that a module belongs to; None for the package itself."""
    return next((p for p in PARTS if f"{module}.".startswith(f"{p}.")), None)


def names_imported(module: str) -> Iterator[str]:
    """Every module and name that a module imports, except for types alone."""
    tree = ast.parse(MODULES[module].read_text())
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


def modules_imported(module: str) -> set[str]:
    """The modules of jax_ep among them, without ARROWS_BACK."""
    found = set()
    for name in names_imported(module):
        parts = name.split(".")
        if parts[0] == "jax_ep":
            inner = (".".join(parts[1:end]) for end in range(len(parts), 1, -1))
            found |= {next((n for n in inner if n in MODULES), "")} - {""}
    return {m for m in found if (module, m) not in ARROWS_BACK}


def draw() -> str:
    """Mermaid text: which folders of jax_ep/_src import from which others."""
    arrows = {
        (source, target)
        for module in MODULES
        if (source := part_of(module)) is not None
        for found in modules_imported(module)
        if (target := part_of(found)) is not None
    }
    floors = [(f"_src.{a}", f"_src.{b}") for a in reversed(FLOORS) for b in FLOORS if a != b]
    drawn = [arrow for arrow in floors if arrow in arrows]
    lines = (f"  {a} --> {b}".replace("_src.", "") for a, b in drawn)
    return "\n".join(["graph TD", *lines])


if __name__ == "__main__":
    print(draw())
