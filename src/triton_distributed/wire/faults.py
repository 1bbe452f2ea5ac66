"""Where in a value the part is that cannot travel. Runs only after an encode failed."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import msgspec

from triton_distributed.wire.models import is_model

MAX_DEPTH = 200  # containers inside containers that are looked into; beyond it the error names the place reached


def explain(value: Any, error: Exception, what: str, try_encode: Callable[[Any], object]) -> Exception:
    """Return the error to raise for a value that could not be encoded.

    Args:
        value: the value.
        error: what its encoding raised.
        what: the name of the value in the error's text.
        try_encode: encodes a part of it, raising where that cannot travel.
    """
    try:
        found = _find(value, what, [], try_encode)
    except Exception:  # a user's property or __iter__ may raise anything; the first error is the one to tell
        found = None
    if found is None:
        found = (what, error)
    path, cause = found
    if isinstance(cause, RecursionError):
        return ValueError(f"{path}: it nests too deeply to travel, or refers to itself")
    if isinstance(cause, OverflowError):
        return ValueError(f"{path}: an int beyond 64 bits cannot travel: use a str or bytes")
    if isinstance(cause, UnicodeEncodeError):
        return ValueError(
            f"{path}: text with a lone surrogate cannot travel ({cause.reason} at {cause.start}): "
            "send bytes, e.g. text.encode(errors='surrogateescape')"
        )
    kind = ValueError if isinstance(cause, ValueError) else TypeError
    return kind(f"{path}: {cause}")


def _find(value: Any, path: str, above: list[int], try_encode: Callable[[Any], object]) -> tuple[str, Exception] | None:
    if id(value) in above:
        return path, ValueError("it contains itself, and only finite values travel")
    if len(above) >= MAX_DEPTH:
        return path, RecursionError()
    above.append(id(value))
    looked = False
    for part, child, key in parts_of(value):
        looked = True
        if key and (fault := _failure(child, try_encode)):
            return f"{path} key {_short(child)}", fault
        if not key and (found := _find(child, path + part, above, try_encode)):
            return found
    above.pop()
    if looked:
        return None
    fault = _failure(value, try_encode)
    return (path, fault) if fault is not None else None


def _failure(value: Any, try_encode: Callable[[Any], object]) -> Exception | None:
    try:
        try_encode(value)
    except Exception as error:
        return error
    return None


def parts_of(value: Any) -> Iterator[tuple[str, Any, bool]]:
    """Yield the parts of a container that msgspec looks into: (how to write it behind the path, it, is it a key)."""
    if isinstance(value, Mapping):
        for key, child in value.items():
            yield "", key, True
            yield f"[{_short(key)}]", child, False
    elif isinstance(value, (list, tuple, deque)):
        for index, child in enumerate(value):
            yield f"[{index}]", child, False
    elif isinstance(value, (set, frozenset)):
        for child in value:
            yield "{…}", child, False
    else:
        names: tuple[str, ...] = ()
        if isinstance(value, msgspec.Struct):
            names = value.__struct_fields__
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            names = tuple(field.name for field in dataclasses.fields(value))
        elif is_model(type(value)):
            names = tuple(type(value).model_fields)
        elif attributes := getattr(type(value), "__attrs_attrs__", ()):
            names = tuple(attribute.name for attribute in attributes)
        for name in names:
            if hasattr(value, name):
                yield f".{name}", getattr(value, name), False


def _short(key: Any) -> str:
    text = f'"{key}"' if type(key) is str and '"' not in key and key.isprintable() else repr(key)
    return text if len(text) <= 60 else f"{text[:57]}…"
