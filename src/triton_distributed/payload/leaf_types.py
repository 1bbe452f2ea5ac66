"""Leaf values of libraries that travel as text: paths, IP addresses, URLs, secrets, fractions, time zones, patterns.

The classes are recognised by what they offer, so that none of these libraries has to be imported here.
"""

from __future__ import annotations

import re
import sys
from functools import lru_cache
from typing import Any

# Libraries whose classes a message may name. Objects of them are cheap to make of any text that a peer may send: no
# patterns, which are compiled, no fractions, which may have a large exponent, no time zones, which are read from files.
_LIBRARIES = frozenset({"pathlib", "ipaddress", "pydantic", "pydantic_core"})
_STANDARD = frozenset({"ipaddress", "fractions"})  # modules of which each class that has values is made from its text


@lru_cache(maxsize=1024)  # more than the leaf classes of one program's messages
def is_textual(kind: type) -> bool:
    """Whether values of this class travel as text (a secret: as what it hides)."""
    return (
        hasattr(kind, "get_secret_value")  # pydantic's Secret, SecretStr, SecretBytes
        or hasattr(kind, "unicode_string")  # pydantic's URLs
        or hasattr(kind, "__fspath__")
        or is_made_from_text(kind)
    )


@lru_cache(maxsize=1024)  # as above
def is_made_from_text(kind: type) -> bool:
    """Whether it is a class of the standard library, or a subclass, that `from_text` makes from such text."""
    path = getattr(sys.modules.get("pathlib"), "PurePath", None)
    zone = getattr(sys.modules.get("zoneinfo"), "ZoneInfo", None)
    return (
        kind is re.Pattern
        or kind.__module__ in _STANDARD
        or (path is not None and issubclass(kind, path))
        or (zone is not None and issubclass(kind, zone))
    )


def to_text(value: Any) -> Any:
    """Return what travels for a value of such a class: text, or what a secret hides.

    Raises:
        TypeError: its text does not say all that it is.
    """
    kind = type(value)
    if hasattr(kind, "get_secret_value"):
        return value.get_secret_value()
    if hasattr(kind, "__fspath__"):
        return value.__fspath__()
    if kind is re.Pattern:
        if re.compile(value.pattern).flags != value.flags:
            raise TypeError("a pattern with flags cannot travel: write them into its text, e.g. (?i)")
        return value.pattern
    if getattr(value, "key", "") is None:
        raise TypeError("a ZoneInfo without a key cannot travel")
    return str(value)


def from_text(kind: Any, text: Any) -> Any:
    """Make a value of such a class from its text.

    Raises:
        ValueError: the text is not one of that class.
    """
    if kind is re.Pattern:
        try:
            return re.compile(text)
        except re.error as error:
            raise ValueError(f"not a pattern: {error}") from error
    if kind.__module__ == "fractions" and "e" in text.lower():
        raise ValueError("not a fraction: an exponent may stand for any number of digits")
    return kind(text)


def named(value: Any) -> tuple[str, str]:
    """Return module and name of a value's class, for `from_named_text`."""
    kind = type(value)
    return kind.__module__, kind.__qualname__


def from_named_text(module: str, name: str, text: Any) -> Any:
    """Make a value of a class that a message names, or return the text where that is none of the few classes here.

    Nothing is imported: a class counts only where its library is imported already.
    """
    if module.partition(".")[0] not in _LIBRARIES:
        return text
    kind = getattr(sys.modules.get(module), name, None)
    if not isinstance(kind, type) or kind.__module__ != module or not is_textual(kind):
        return text
    return from_text(kind, text)
