"""A hook of mkdocs: pages from outside of docs/, links between them, and paths of public names."""

import importlib
import inspect
import os
import re
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[2]
# Pages of the repository that the site shows too: path in the repository, path in the site.
OUTSIDE = {
    "README.md": "index.md",
    "CHANGELOG.md": "changes.md",
    "CONTRIBUTING.md": "contributing.md",
    "benchmarks/README.md": "benchmarks.md",
    "benchmarks/NOTES.md": "benchmarks-notes.md",
}
_SOURCES = {site: source for source, site in OUTSIDE.items()}
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
_DIRECTIVE = re.compile(r"^::: (\S+)$(?:\n    options:$)?", re.MULTILINE)


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages from outside of docs/."""
    for source, site in OUTSIDE.items():
        files.append(File.generated(config, site, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Rewrites links and directives of one page."""
    site = page.file.src_uri
    if site == "index.md":
        page.meta["hide"] = ["navigation"]  # it would hold nothing but this page
    source = PurePosixPath(_SOURCES.get(site, f"docs/{site}"))

    def link(found: re.Match[str]) -> str:
        mark, text, target = found.groups()
        path, hash_, heading = target.partition("#")
        if not path or "://" in target:
            return found[0]
        wanted = os.path.normpath(source.parent / path)
        page_of = OUTSIDE.get(wanted) or wanted.removeprefix("docs/")
        if files.get_file_from_path(page_of) is not None:
            relative = os.path.relpath(page_of, PurePosixPath(site).parent)
            return f"{mark}[{text}]({relative}{hash_}{heading})"
        if config.repo_url:
            return f"[{text}]({config.repo_url.rstrip('/')}/blob/main/{wanted})"
        return text  # a file that the site does not have

    return _DIRECTIVE.sub(_directive, _LINK.sub(link, markdown))


def _directive(found: re.Match[str]) -> str:
    """Names the place where a public object is defined, which its short path may hide."""
    module, _, name = found[1].rpartition(".")
    thing = getattr(importlib.import_module(module), name, None) if module else None
    if thing is None or isinstance(thing, ModuleType) or not inspect.getmodule(thing):
        return found[0]
    path = f"{thing.__module__}.{thing.__qualname__}"
    return f"::: {path}\n    options:\n      heading: {found[1]}\n      toc_label: {name}"
