"""Values as JSON for people and scripts. A value that JSON cannot hold is shown as an object that names its type.

- bytes, bytearray, memoryview: `{"bytes": {"size": 3, "base64": "AQID"}}`; above SHOWN_BYTES without the content
- an array: `{"ndarray": {"dtype": "float32", "shape": [2], "values": [1.0, 2.0]}}`; above SHOWN_VALUES elements without
  the values
- NaN and infinities: null
- a key that is not text: its `str`
- any other value: as msgspec writes it (datetime: RFC 3339), or its repr
"""

from __future__ import annotations

import argparse
import base64
import fnmatch
import sys
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


def json_option(parser: argparse.ArgumentParser, what: str) -> None:
    """Add `--json` to a command. docs/cli-json.md names the fields of what it prints; a test compares them.

    Args:
        what: what one line is, e.g. "one instance".
    """
    parser.add_argument("--json", action="store_true", help=f"print JSON: each line is {what}")


def write_json(value: Any) -> None:
    """Write a value as one line of JSON to standard output, at once."""
    sys.stdout.buffer.write(json_line(value))
    sys.stdout.buffer.flush()


def span(seconds: float) -> str:
    """A duration in one number and its unit, for people: `95 s`, `12 min`, `30 h`, `5 d`."""
    for unit, size, most in (("s", 1, 120), ("min", 60, 120), ("h", 3600, 48)):
        if seconds < most * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds / 86400:.0f} d"


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
    found = parts(annotated)
    return annotated.data() if found.keys() <= {"data"} else found


def parts(annotated: Annotated) -> dict[str, Any]:
    """Return the parts of an item by name: `data` unless it is None, `event`, `comments` and `id` if it has them."""
    each = {"event": annotated.event(), "comments": annotated.comments(), "id": annotated.id()}
    present = {name: part for name, part in each.items() if part}
    return present if annotated.data() is None and present else {"data": annotated.data(), **present}


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
