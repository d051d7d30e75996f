"""Imports between the modules of jax_ep. The program draws the picture in the docs."""

import ast
from collections.abc import Iterator
from pathlib import Path

import jax_ep

PACKAGE = Path(jax_ep.__file__).parent
PICTURE = Path(__file__).parent.parent / "docs" / "images" / "floors.svg"
FLOORS = ("base", "processes", "group", "ops", "opening")  # of jax_ep/_src, the lowest first
# A part may import from itself and from the parts before it; `import jax_ep` is free.
TESTING = (
    "compare",
    "routing",
    "launch",
    "clock",
    "ranks",
    "cases",
    "conformance",
    "run",
    "doctor",
)
PARTS = (
    *(f"_src.{floor}" for floor in FLOORS),
    "compat",
    "reference",
    *(f"testing.{name}" for name in TESTING),
    "testing",
    "bench",
    "__main__",
)
# Group.open and Group.get import their bodies late: these use operations, which use Group.
ARROWS_BACK = {("_src.group.group", "_src.opening.open")}


def _name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


# Paths by module name, as in `_src.base.spec`.
MODULES = {_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def part_of(module: str) -> str | None:
    """Returns the part to which a module belongs; None for the package itself."""
    return next((p for p in PARTS if f"{module}.".startswith(f"{p}.")), None)


def names_imported(module: str) -> Iterator[str]:
    """Yields every module and name that a module imports, except those for types alone."""
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
    """Returns the modules of jax_ep that a module imports, without ARROWS_BACK."""
    found = set()
    for name in names_imported(module):
        parts = name.split(".")
        if parts[0] == "jax_ep":
            inner = (".".join(parts[1:end]) for end in range(len(parts), 1, -1))
            found |= {next((n for n in inner if n in MODULES), "")} - {""}
    return {m for m in found if (module, m) not in ARROWS_BACK}


def arrows() -> list[tuple[str, str]]:
    """Returns the pairs of folders of jax_ep/_src with imports, from the top floor downwards."""
    found = {(part_of(module), part_of(m)) for module in MODULES for m in modules_imported(module)}
    pairs = [(a, b) for a in reversed(FLOORS) for b in reversed(FLOORS) if a != b]
    return [(a, b) for a, b in pairs if (f"_src.{a}", f"_src.{b}") in found]


def draw() -> str:
    """Returns SVG text: a box for each floor, and an arc for each pair of floors in `arrows`."""
    height, gap, left, width = 34, 22, 10, 130
    top = {name: 10 + (height + gap) * i for i, name in enumerate(reversed(FLOORS))}
    shapes = []
    for name, y in top.items():
        shapes.append(
            f'<rect x="{left}" y="{y}" width="{width}" height="{height}" rx="5"/>'
            f'<text x="{left + width / 2:g}" y="{y + 22}">{name}</text>'
        )
    drawn = arrows()
    for number, (source, target) in enumerate(drawn):
        right = left + width
        begin = top[source] + height - 8 - 4 * (number % 3)
        end = top[target] + 8 + 3 * (number % 4)
        reach = right + 30 + 28 * abs(FLOORS.index(source) - FLOORS.index(target))
        shapes.append(
            f'<path d="M {right} {begin} C {reach} {begin}, {reach} {end}, {right + 7} {end}" '
            'marker-end="url(#arrow)"/>'
        )
    size = f'width="300" height="{max(top.values()) + height + 10}"'
    marker = (
        '<marker id="arrow" markerWidth="8" markerHeight="8" refX="1" refY="3" orient="auto">'
        '<path d="M 0 0 L 7 3 L 0 6 z" style="fill:#888;stroke:none"/></marker>'
    )
    style = (
        "rect{fill:#5b7c99}text{fill:#fff;font:15px sans-serif;text-anchor:middle}"
        "path{fill:none;stroke:#888;stroke-width:1.5}"
    )
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size}>',
        f"<style>{style}</style>",
        f"<defs>{marker}</defs>",
        *shapes,
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PICTURE.write_text(draw())
