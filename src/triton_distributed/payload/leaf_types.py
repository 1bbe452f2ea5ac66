"""Library values that travel as text: paths, IP addresses, URLs, secrets, fractions, time zones, patterns.

This module recognises the classes by their attributes, so that it need not import any of these libraries.
"""

from __future__ import annotations

import re
import sys
from functools import lru_cache
from typing import Any

# Libraries whose classes a message may name. Their objects are cheap to make from any text that a peer may send.
# Patterns are not allowed, because they are compiled; nor fractions, which may have a large exponent; nor time zones,
# which are read from files.
_LIBRARIES = frozenset({"pathlib", "ipaddress", "pydantic", "pydantic_core"})
_STANDARD = frozenset({"ipaddress", "fractions"})  # each class of these modules can be made from its text


@lru_cache(maxsize=1024)  # more than the leaf classes of one program's messages
def is_textual(kind: type) -> bool:
    """Return whether values of this class travel as text; a secret travels as the value that it hides."""
    return (
        hasattr(kind, "get_secret_value")  # pydantic's Secret, SecretStr, SecretBytes
        or hasattr(kind, "unicode_string")  # pydantic's URLs
        or hasattr(kind, "__fspath__")
        or is_made_from_text(kind)
    )


@lru_cache(maxsize=1024)  # the same bound as above
def is_made_from_text(kind: type) -> bool:
    """Return whether `from_text` can make values of this class: one of the standard library's, or a subclass."""
    path = getattr(sys.modules.get("pathlib"), "PurePath", None)
    zone = getattr(sys.modules.get("zoneinfo"), "ZoneInfo", None)
    return (
        kind is re.Pattern
        or kind.__module__ in _STANDARD
        or (path is not None and issubclass(kind, path))
        or (zone is not None and issubclass(kind, zone))
    )


def to_text(value: Any) -> Any:
    """Return the text of a value, or the value that a secret hides.

    Raises:
        TypeError: the text would not hold all of the value.
    """
    kind = type(value)
    if hasattr(kind, "get_secret_value"):
        return value.get_secret_value()
    if hasattr(kind, "__fspath__"):
        return value.__fspath__()
    if kind is re.Pattern:
        if re.compile(value.pattern).flags != value.flags:
            raise TypeError("a pattern with flags cannot travel: write the flags into its text, e.g. (?i)")
        return value.pattern
    if getattr(value, "key", "") is None:
        raise TypeError("a ZoneInfo without a key cannot travel")
    return str(value)


def from_text(kind: Any, text: Any) -> Any:
    """Make a value of such a class from its text.

    Raises:
        ValueError: the text is invalid for that class.
    """
    if kind is re.Pattern:
        try:
            return re.compile(text)
        except re.error as error:
            raise ValueError(f"not a pattern: {error}") from error
    if kind.__module__ == "fractions" and "e" in text.lower():
        raise ValueError("not a fraction: an exponent is not allowed, because it may stand for any number of digits")
    return kind(text)


def named(value: Any) -> tuple[str, str]:
    """Return the module and the name of a value's class, for `from_named_text`."""
    kind = type(value)
    return kind.__module__, kind.__qualname__


def from_named_text(module: str, name: str, text: Any) -> Any:
    """Make a value of a class that a message names. Return the text if the class is not one of the few allowed here.

    Nothing is imported: a class counts only if its library is imported already.
    """
    if module.partition(".")[0] not in _LIBRARIES:
        return text
    kind = getattr(sys.modules.get(module), name, None)
    if not isinstance(kind, type) or kind.__module__ != module or not is_textual(kind):
        return text
    return from_text(kind, text)
