"""W3C Trace Context: whether a `traceparent` is valid, and the ids in it."""

from __future__ import annotations

import re
from collections.abc import MutableMapping
from typing import Any, NamedTuple

# Version ff and ids of zeros alone are invalid. Later versions than 00 may have more fields.
_VALID = re.compile(
    r"(?!ff)(?P<version>[0-9a-f]{2})-(?!0{32})(?P<trace>[0-9a-f]{32})-(?!0{16})(?P<span>[0-9a-f]{16})-[0-9a-f]{2}"
    r"(?P<more>-[\x21-\x7e]{1,200})?"
)


class TraceParent(NamedTuple):
    """The ids in a `traceparent`: 32 and 16 lower-case hexadecimal digits.

    Attributes:
        trace_id: the trace.
        span_id: the span that is the parent of what follows.
    """

    trace_id: str
    span_id: str


def parse(text: object) -> TraceParent | None:
    """Return the ids in a `traceparent`, or None if it is invalid."""
    found = _VALID.fullmatch(text) if isinstance(text, str) else None
    if found is None or (found["more"] and found["version"] == "00"):
        return None
    return TraceParent(found["trace"], found["span"])


def drop_invalid(travelling: MutableMapping[str, Any]) -> None:
    """Remove an invalid `traceparent`, and a `tracestate` without a valid one, as W3C Trace Context asks."""
    if parse(travelling.get("traceparent")) is None:
        travelling.pop("traceparent", None)
        travelling.pop("tracestate", None)
