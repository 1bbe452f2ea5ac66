"""What a check has found."""

from __future__ import annotations

from typing import Literal

import msgspec

Level = Literal["ok", "warning", "error"]


class Finding(msgspec.Struct, frozen=True):
    """One line of a diagnosis.

    Attributes:
        level: `ok`, `warning` (it works, and may fail or be slow) or `error` (it cannot work).
        part: the part of the system that was checked.
        text: what was found.
        advice: what to do about it; empty for `ok`.
    """

    level: Level
    part: str
    text: str
    advice: str = ""


def ok(part: str, text: str) -> Finding:
    """A part that works."""
    return Finding("ok", part, text)


def warning(part: str, text: str, advice: str) -> Finding:
    """A part that works, and may fail or be slow."""
    return Finding("warning", part, text, advice)


def error(part: str, text: str, advice: str) -> Finding:
    """A part that cannot work."""
    return Finding("error", part, text, advice)
