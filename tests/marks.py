"""The mark with which a test says what it leaves behind, and why."""

from __future__ import annotations

import pytest

KINDS = ("tasks", "threads", "descriptors", "children", "asyncio errors", "socket files")


def allowed(item: pytest.Item, kind: str) -> bool:
    """Whether the test is marked `leaves(kind, reason=…)`."""
    for mark in item.iter_markers("leaves"):
        unknown = set(mark.args) - set(KINDS)
        if unknown or not mark.args or not mark.kwargs.get("reason"):
            pytest.fail(f"{item.nodeid}: leaves(…) takes some of {KINDS} and a reason=", pytrace=False)
        if kind in mark.args:
            return True
    return False
