"""An extension of griffe: the sections of our docstrings that Google's style does not have.

"Collective: ...", "Gradient: ..." and their like are paragraphs that begin with a name. Griffe
would take the first line of one for the title of an admonition.
"""

import re
from typing import Any

import griffe

_NAMES = "Batches|Collective|Gradient|Limits|Raises|Returns|Source|Warns"
# With text behind the colon; a section of Google's style has none there.
_SECTION = re.compile(rf"^({_NAMES}|Else): (.+(?:\n[ \t]+.+)*)$", re.MULTILINE)


def _paragraph(found: re.Match[str]) -> str:
    text = re.sub(r"\s+", " ", found[2])
    if re.match(r"[a-z]+\b(?!_)", text):
        text = text[0].upper() + text[1:]
    return f"\n**{found[1]}.** {text}\n"


class OurSections(griffe.Extension):
    """Makes paragraphs of them, before docstrings are parsed."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Changes the docstring of one object."""
        if obj.docstring:
            obj.docstring.value = _SECTION.sub(_paragraph, obj.docstring.value)
