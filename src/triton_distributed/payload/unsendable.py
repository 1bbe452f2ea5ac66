"""Finds the part of a value that cannot travel. Runs only after an encode failed."""

from __future__ import annotations

import datetime
import enum
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from triton_distributed.payload.fields import field_names, is_model

MAX_DEPTH = 200  # nested containers that are searched; the error for deeper values names the place reached


def explain(value: Any, error: Exception, what: str, try_encode: Callable[[Any], object]) -> Exception:
    """Return the error to raise for a value that could not be encoded.

    Args:
        value: the value.
        error: the error that its encoding raised.
        what: the name of the value in the error's text.
        try_encode: encodes a part of the value; raises if that part cannot travel.
    """
    path, cause, part = _find(value, what, [], try_encode) or (what, error, value)
    text, kind = _words(cause, part)
    return kind(f"{path}: {text}")


class _Cycle(Exception):
    """A value contains itself."""


def _words(cause: Exception, value: Any) -> tuple[str, type[Exception]]:
    """Say why a value cannot travel, and what to send instead. Each text names the type of the value."""
    name = _article(type(value).__qualname__)
    if isinstance(cause, _Cycle):
        return f"it contains itself, but only finite values travel ({name})", ValueError
    if isinstance(cause, RecursionError):
        return f"it nests too deeply to travel, or refers to itself ({name})", ValueError
    if isinstance(cause, UnicodeEncodeError):
        return (
            f"text with a lone surrogate cannot travel ({name}, {cause.reason} at {cause.start}): "
            "send bytes, e.g. text.encode(errors='surrogateescape')"
        ), ValueError
    if isinstance(cause, OverflowError):
        return _overflow(cause, value, name), ValueError
    text = str(cause)
    if "cannot travel" not in text:  # the error is not one of this package
        text = f"{name} cannot travel: {text or type(cause).__name__}"
    return text, ValueError if isinstance(cause, ValueError) else TypeError


def _overflow(cause: OverflowError, value: Any, name: str) -> str:
    number = value.value if isinstance(value, enum.Enum) else value
    if isinstance(number, int):
        words = "an int beyond 64 bits"
        return f"{words if type(value) is int else f'{name} ({words})'} cannot travel: use a str or bytes"
    if isinstance(number, datetime.date):  # this includes a datetime
        return f"{name} that has no date in UTC cannot travel ({cause}): send its .isoformat()"
    return f"{name} out of range cannot travel ({cause}): send it as text"


def _article(name: str) -> str:
    return f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"


Found = tuple[str, Exception, Any]
"""A path, the error there, and the value there."""


def _find(value: Any, path: str, above: list[int], try_encode: Callable[[Any], object]) -> Found | None:
    if id(value) in above:
        return path, _Cycle(), value
    if len(above) >= MAX_DEPTH:
        return path, RecursionError(), value
    above.append(id(value))
    looked = False
    try:
        for part, child, key in parts_of(value):
            looked = True
            if found := _find(child, f"{path} key {_short(child)}" if key else path + part, above, try_encode):
                return found
    except Exception as error:  # from a user's property
        return path, error, value
    above.pop()
    if looked:
        return None
    try:
        try_encode(value)
    except Exception as error:  # This is the error that the search is for.
        return path, error, value
    return None


def parts_of(value: Any) -> Iterator[tuple[str, Any, bool]]:
    """Yield the parts of a container that msgspec encodes: (text to append to the path, part, whether it is a key)."""
    if isinstance(value, dict):
        for key, child in dict.items(value):
            yield "", key, True
            yield f"[{_short(key)}]", child, False
    elif isinstance(value, (list, tuple, deque)):
        for index, child in enumerate(value):
            yield f"[{index}]", child, False
    elif isinstance(value, (set, frozenset)):
        for child in value:
            yield "{…}", child, False
    else:
        kind: Any = type(value)
        if isinstance(value, msgspec.Struct):
            names: tuple[str, ...] = value.__struct_fields__
        else:
            names = tuple(kind.model_fields) if is_model(kind) else field_names(kind)
        for name in names:
            if hasattr(value, name):
                yield f".{name}", getattr(value, name), False


def _short(key: Any) -> str:
    text = f'"{key}"' if type(key) is str and '"' not in key and key.isprintable() else repr(key)
    return text if len(text) <= 60 else f"{text[:57]}…"
