"""W3C Trace Context: whether a `traceparent` is valid, and the ids in it."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any, NamedTuple

MOST_CHARACTERS = 256
"""The longest `traceparent` of a later version of the specification. Of the present one each has 55 characters."""

_HEX = "0123456789abcdef"
_LENGTHS = [2, 32, 16, 2]  # Version, trace, span, flags.


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
    if not isinstance(text, str) or len(text) > MOST_CHARACTERS or not (text.isascii() and text.isprintable()):
        return None
    fields = text.split("-", 4)
    if list(map(len, fields[:4])) != _LENGTHS or "".join(fields[:4]).strip(_HEX):
        return None
    version, trace_id, span_id, _ = fields[:4]
    if version == "ff" or (version == "00" and len(fields) > 4):  # Later versions may have more fields.
        return None
    if not trace_id.strip("0") or not span_id.strip("0"):
        return None
    return TraceParent(trace_id, span_id)


def drop_invalid(travelling: MutableMapping[str, Any]) -> None:
    """Remove an invalid `traceparent`, and a `tracestate` without a valid one, as W3C Trace Context asks."""
    if parse(travelling.get("traceparent")) is None:
        travelling.pop("traceparent", None)
        travelling.pop("tracestate", None)
