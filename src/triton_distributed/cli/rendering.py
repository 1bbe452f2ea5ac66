"""Values as JSON for people and scripts. A value that JSON cannot hold is shown as an object that names its type.

- bytes, bytearray, memoryview: `{"bytes": {"size": 3, "base64": "AQID"}}`; above SHOWN_BYTES without the content
- an array: `{"ndarray": {"dtype": "float32", "shape": [2], "values": [1.0, 2.0]}}`; above SHOWN_VALUES elements without
  the values
- NaN and infinities: null
- a key that is not text: its `str`
- any other value: as msgspec writes it (datetime: RFC 3339), or its repr
"""

from __future__ import annotations

import base64
import fnmatch
from collections.abc import Sequence
from typing import Any

import msgspec

from triton_distributed.runtime import Annotated

SHOWN_BYTES = 1024
"""Largest bytes value shown with its content, in bytes: a few lines of a terminal."""

SHOWN_VALUES = 16
"""Largest array shown with its values, in elements: one line of a terminal."""

_encode = msgspec.json.Encoder(enc_hook=repr).encode


def json_line(value: Any) -> bytes:
    """Return a value as one line of JSON, including the line break."""
    return _encode(plain(value)) + b"\n"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table with aligned columns."""
    cells = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(map(str.ljust, line, widths)).rstrip() for line in cells]


def names_match(name: str, pattern: str | None) -> bool:
    """Whether a shell pattern is for an endpoint's name, or for its first parts; None matches every name."""
    return pattern is None or fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"{pattern}.*")


def item(annotated: Annotated) -> Any:
    """Return what to show of an item: its data, or all its parts by name if it has an event, comments or an id."""
    parts = {"event": annotated.event(), "comments": annotated.comments(), "id": annotated.id()}
    present = {name: part for name, part in parts.items() if part}
    if not present:
        return annotated.data()
    return present if annotated.data() is None else {"data": annotated.data(), **present}


def plain(value: Any) -> Any:
    """Return a value as plain values that JSON can show; large content is left out."""
    if isinstance(value, dict):
        return {key if isinstance(key, str) else str(key): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, bytes | bytearray | memoryview):
        return {"bytes": _bytes(bytes(value))}
    if hasattr(value, "dtype") and hasattr(value, "shape") and hasattr(value, "tolist"):
        return {"ndarray": _array(value)}
    return value


def _bytes(data: bytes) -> dict[str, Any]:
    shown = {"base64": base64.b64encode(data).decode()} if len(data) <= SHOWN_BYTES else {}
    return {"size": len(data), **shown}


def _array(array: Any) -> dict[str, Any]:
    count = 1
    for each in array.shape:
        count *= each
    shown = {"values": plain(array.tolist())} if count <= SHOWN_VALUES else {}
    return {"dtype": str(array.dtype), "shape": list(array.shape), **shown}
