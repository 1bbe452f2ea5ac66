"""Text that may be shown: without passwords, tokens and the content of key files."""

from __future__ import annotations

import re
from typing import Any

__all__: list[str] = []


def without_secrets(text: str) -> str:
    """Return text with `***` for the user and password of each URL in it, and for the content of key files."""
    text = re.sub(r"(?s)://(?:(?!://).)*@", "://***@", text)  # A password may contain an @ or a comma.
    return re.sub(r"(?s)-----BEGIN.*", "***", text)


def shown(setting: str, value: Any) -> Any:
    """Return the value of a setting in a form that an error, a log line or a `repr` may show."""
    if any(word in setting for word in ("PASSWORD", "TOKEN", "NKEY")):
        return value and "***"
    if not isinstance(value, str):
        text = str(value)
        return value if without_secrets(text) == text else without_secrets(text)
    before, mark, after = without_secrets(value).partition("://")
    if "@" in before:  # A URL without its scheme.
        before = f"***@{before.rpartition('@')[2]}"
    query = mark and after.partition("?")[1]
    return f"{before}{mark}{after.partition('?')[0]}?***" if query else f"{before}{mark}{after}"
