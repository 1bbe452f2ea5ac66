"""The form of log lines: text with the request's id, or one JSON object a line."""

from __future__ import annotations

import logging
from datetime import UTC, datetime
from typing import Any

import msgspec

from triton_distributed.observe.log_context import FIELDS

_STANDARD = frozenset(logging.LogRecord("", 0, "", 0, "", None, None).__dict__) | {"message", "asctime", "taskName"}
"""The attributes that every record has. All others are fields that the program or `LogContext` has added."""


class JsonLines(logging.Formatter):
    """Formats each record as one line of JSON.

    Each line has `time` (UTC, RFC 3339), `level`, `logger` and `message`, and an error's traceback is `exception`. In a
    handler `LogContext` adds `request_id`, `endpoint`, `instance_id`, and for a trace `traceparent`, `trace_id` and
    `span_id`. Fields of `extra=` follow.
    """

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        more = {name: value for name, value in record.__dict__.items() if name not in _STANDARD}
        line = {name: value for name, value in more.items() if name not in FIELDS or value != "-"} | line
        if record.exc_info and not record.exc_text:
            record.exc_text = self.formatException(record.exc_info)
        if record.exc_text:
            line["exception"] = record.exc_text
        if record.stack_info:
            line["stack"] = self.formatStack(record.stack_info)
        try:
            return msgspec.json.encode(line, enc_hook=repr).decode()
        except (UnicodeEncodeError, TypeError, ValueError, RecursionError):  # e.g. a file name that is not UTF-8
            return msgspec.json.encode({name: _text(value) for name, value in line.items()}).decode()


def _text(value: object) -> str:
    return str(value).encode("utf-8", "backslashreplace").decode()


class TextLines(logging.Formatter):
    """Formats each record as text. The ids of its request and its trace, if there are any, precede the message."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 (the name is logging's)
        request, trace = (record.__dict__.get(name, "-") for name in ("request_id", "trace_id"))
        ids = " ".join([*([request] if request != "-" else []), *([f"trace {trace}"] if trace != "-" else [])])
        if not ids:
            return super().formatMessage(record)
        return f"{record.asctime} {record.levelname} {record.name}: [{ids}] {record.message}"


def line_of(form: str, text: str, level: int = logging.WARNING) -> str:
    """A line for standard error that is written whatever the log's level: as it is, or with `json` as an object.

    Args:
        form: see `TRD_LOG_FORMAT`.
        level: the level in the object.
    """
    if form != "json":
        return text
    return JsonLines().format(logging.LogRecord("triton_distributed", level, "", 0, text, None, None))


def log_formatter(form: str) -> logging.Formatter:
    """Return the formatter of a form: `text` or `json`; see `TRD_LOG_FORMAT`."""
    return JsonLines() if form == "json" else TextLines()
