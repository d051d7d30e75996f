"""The documents: their code runs and prints what they show, and their links lead somewhere.

The ```python blocks of a page run one after another, as one program. A block must print the
```text block right after it, or the comments behind its top-level `print`s, or nothing. `...`
stands for any text.
"""

import argparse
import doctest
import inspect
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import jax_ep
from jax_ep._src.base import registry
from jax_ep.bench import run as bench

ROOT = Path(__file__).parent.parent
PAGES = sorted(p for folder in ("", "docs/**/", "benchmarks/") for p in ROOT.glob(f"{folder}*.md"))
COMMAND = "python -m jax_ep "


class Block(NamedTuple):
    page: Path
    line: int  # number of the first line
    language: str
    source: str
    expected: str | None


def _blocks(page: Path) -> Iterator[Block]:
    text = page.read_text()
    for found in re.finditer(
        r"^```(\w*)\n(.*?)^```\n(?:\n*```text\n(.*?)^```\n)?", text, re.DOTALL | re.MULTILINE
    ):
        yield Block(page, text[: found.start(2)].count("\n") + 1, *found.groups())


BLOCKS = [block for page in PAGES for block in _blocks(page)]
PROGRAMS = sorted({b.page for b in BLOCKS if b.language == "python"})
COMMANDS = [
    (block, line.split("#")[0].strip())
    for block in BLOCKS
    if block.language in {"sh", "bash"}
    for line in block.source.splitlines()
    if line.startswith(COMMAND)
]


def _name(value):
    """Returns the id of a test."""
    path = value.page if isinstance(value, Block) else value
    return str(path.relative_to(ROOT)) if isinstance(path, Path) else str(path)


@pytest.fixture
def groups_end():
    """Closes and checks the groups that a page leaves open."""
    before = set(registry.open_groups)
    yield
    opened = [registry.open_groups[i] for i in set(registry.open_groups) - before]
    for group in opened:
        group.close()
    for group in opened:
        group.check()


def _compare(block: Block, got: str) -> None:
    expected = block.expected
    if expected is None:
        said = re.findall(r"^print\(.*\)  # (.*)$", block.source, re.MULTILINE)
        expected = "".join(f"{line}\n" for line in said)
    same = doctest.OutputChecker().check_output(expected, got, doctest.ELLIPSIS)
    assert same, f"{block.page}:{block.line} should print\n{expected}but prints\n{got}"


@pytest.mark.parametrize("page", PROGRAMS, ids=_name)
@pytest.mark.usefixtures("groups_end")
def test_python_blocks_print_what_pages_show(page, capsys):
    names = {"__name__": "__main__"}
    for block in _blocks(page):
        if block.language == "python":
            # The newlines make errors show the line numbers of the page.
            code = compile("\n" * (block.line - 1) + block.source, page, "exec")
            exec(code, names)
            _compare(block, capsys.readouterr().out)


@pytest.mark.parametrize(("block", "command"), COMMANDS, ids=_name)
def test_commands_are_understood(block, command, tmp_path):
    arguments = shlex.split(command.removeprefix(COMMAND))
    if arguments[0] == "bench":  # a run takes minutes, so the test only parses its arguments
        parser = argparse.ArgumentParser(exit_on_error=False)
        bench.add_arguments(parser)
        parser.parse_args(arguments[1:])
        return
    done = subprocess.run(
        [sys.executable, "-m", "jax_ep", *arguments],
        cwd=tmp_path,  # next to the sources, Python would import those
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    if block.expected is not None:
        _compare(block, done.stdout)


def test_tables_are_of_the_records():
    command = [sys.executable, ROOT / "benchmarks" / "pages", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_api_pages_have_every_public_name():
    pages = "".join(page.read_text() for page in (ROOT / "docs" / "api").glob("*.md"))
    shown = re.findall(r"^::: jax_ep\.(\w+)$", pages, re.MULTILINE)
    public = {
        name
        for name, value in vars(jax_ep).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert len(shown) == len(set(shown))
    assert set(shown) - {"reference"} == public


def test_protocol_page_has_every_word():
    (header,) = (ROOT / "xla_ffi").glob("*/protocol.h")
    row = re.compile(r"^//   ([a-z_]+)[\[\], a-z]* +(?:rank p|any rank) ", re.MULTILINE)
    words = row.findall(header.read_text())
    assert len(words) >= 10
    page = (ROOT / "docs" / "protocol.md").read_text()
    assert re.findall(r"^\| `?([a-z_]+)[^|]*\| (?:rank p|any rank) \|", page, re.MULTILINE) == words


def test_readme_layer_is_short():
    layer = next(b for b in _blocks(ROOT / "README.md") if b.language == "python")
    assert len(layer.source.splitlines()) <= 10


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        path, _, heading = target.partition("#")
        if target.startswith("http"):
            continue
        found = page.parent / path if path else page
        assert found.exists(), target
        if heading:
            assert heading in _anchors(found), target


def _anchors(page: Path) -> set[str]:
    """Returns the anchors of headings: their words in lower case, joined by hyphens."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}
