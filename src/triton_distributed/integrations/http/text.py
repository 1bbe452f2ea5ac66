"""Items as bytes: JSON, server-sent events, lines. No I/O."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import msgspec

_LINE_ENDS = re.compile(r"\r\n|\r|\n")
_NOT_IN_A_FIELD = re.compile(r"[\r\n\0]")


@dataclass(frozen=True, slots=True)
class Event:
    """A server-sent event.

    Args:
        data: text is sent as it is, line by line; any other value is sent as JSON.
        event: the event's type; None for the default, `message`.
        id: the event's id, which a browser sends back as `Last-Event-ID` when it connects again.

    Raises:
        ValueError: the type or the id contains a line end or a NUL.
    """

    data: Any
    event: str | None = None
    id: str | None = None

    def __post_init__(self) -> None:
        for name, value in (("event", self.event), ("id", self.id)):
            if value is not None and _NOT_IN_A_FIELD.search(value):
                raise ValueError(f"{name}={value!r}: a field of a server-sent event has no line end and no NUL")


def _plain(value: Any) -> Any:
    """What msgspec writes in place of a value of another library."""
    if callable(dump := getattr(value, "model_dump_json", None)):  # A pydantic model.
        return msgspec.Raw(dump(by_alias=True).encode())
    if callable(tolist := getattr(value, "tolist", None)):  # A NumPy array or scalar.
        return tolist()
    raise TypeError(f"a value of type {type(value).__qualname__} cannot be written as JSON: convert it first")


to_json = msgspec.json.Encoder(enc_hook=_plain).encode


def to_event(value: Any) -> bytes:
    """The bytes of an `Event`, or of an event whose data is this value.

    Raises:
        TypeError, ValueError: the data cannot be written as JSON or as UTF-8.
    """
    if not isinstance(value, Event):
        value = Event(value)
    data = value.data
    if isinstance(data, str):
        lines = b"".join(b"data: %b\n" % line.encode() for line in _LINE_ENDS.split(data))
    else:
        lines = b"data: %b\n" % to_json(data)  # JSON has no line ends.
    if value.event is not None:
        lines = b"event: %b\n%b" % (value.event.encode(), lines)
    if value.id is not None:
        lines = b"id: %b\n%b" % (value.id.encode(), lines)
    return lines + b"\n"


def to_line(value: Any) -> bytes:
    """A value as a line of JSON.

    Raises:
        TypeError, ValueError: the value cannot be written as JSON.
    """
    return to_json(value) + b"\n"
