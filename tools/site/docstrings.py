"""An extension of griffe: our sections of docstrings, and the words that an option takes.

"Collective: ...", "Gradient: ..." and their like are paragraphs that begin with a name. Griffe
would take the first line of one for the title of an admonition.

A parameter whose type is an alias of `Literal[...] | str` is shown with the words in place of it.
"""

import importlib
import re
import typing
from typing import Any

import griffe

_NAMES = "Batches|Collective|Gradient|Limits|Raises|Returns|Source|Warns"
# With text behind the colon; a section of Google's style has none there.
_SECTION = re.compile(rf"^({_NAMES}|Else): (.+(?:\n[ \t]+.+)*)$", re.MULTILINE)
_ALIAS = re.compile(r"\b[A-Z]\w+Name\b")


def _paragraph(found: re.Match[str]) -> str:
    text = re.sub(r"\s+", " ", found[2])
    if re.match(r"[a-z]+\b(?!_)", text):
        text = text[0].upper() + text[1:]
    return f"\n**{found[1]}.** {text}\n"


class OurDocstrings(griffe.Extension):
    """Changes objects before their docstrings are parsed."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Makes paragraphs of our sections."""
        if obj.docstring:
            obj.docstring.value = _SECTION.sub(_paragraph, obj.docstring.value)

    def on_function_instance(self, *, func: griffe.Function, **kwargs: Any) -> None:
        """Shows the words of options."""
        for parameter in func.parameters:
            annotation = str(parameter.annotation)
            if _ALIAS.search(annotation):
                module = importlib.import_module(func.module.path)
                parameter.annotation = _ALIAS.sub(
                    lambda found, module=module: _words(module, found[0]), annotation
                )


def _words(module: Any, name: str) -> str:
    kinds = typing.get_args(getattr(module, name, None))
    words = [word for kind in kinds for word in typing.get_args(kind)]
    return " | ".join(f'"{word}"' for word in words) or name
