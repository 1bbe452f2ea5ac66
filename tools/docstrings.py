"""Shows sections such as `Raises, from iteration:` as lists on the site: an extension of griffe."""

from __future__ import annotations

import re
from typing import Any

import griffe

# A heading that is more than the plain `Raises:` or `Args:`, and the indented lines below it.
SECTION = re.compile(r"^((?:Raises|Args)\b[^:\n][^\n]*:)\n((?:    [^\n]*\n?)+)", re.MULTILINE)
ENTRY = re.compile(r"^ {4}([\w., ]+):(?= )", re.MULTILINE)


def as_list(section: re.Match[str]) -> str:
    """The section as a bold heading and a list."""
    entries = ENTRY.sub(lambda entry: "- " + ", ".join(f"`{each}`" for each in entry[1].split(", ")) + ":", section[2])
    return f"**{section[1]}**\n\n{entries}"


class Sections(griffe.Extension):
    """Rewrites the docstrings."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = SECTION.sub(as_list, obj.docstring.value)
