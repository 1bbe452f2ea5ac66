"""The current line of a handler: the line of the user's code at which its task is suspended."""

from __future__ import annotations

import asyncio
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

_PACKAGE = str(Path(__file__).parent.parent)

_STEPS = ("async_generator_asend", "async_generator_athrow")
"""Types of the objects that a task awaits while it iterates over an async generator."""

_STANDARD_LIBRARY = str(Path(asyncio.__file__).parent.parent)


def standing(task: asyncio.Task[Any] | None, items: object) -> str:
    """Return the innermost line of the user's code, as `file:line in function`.

    Args:
        task: the task that serves a request.
        items: the handler's async iterator of items. An async generator cannot be found through the task.
    """
    if task is None or task.done():
        return "its end"
    inner = getattr(items, "inner", None)
    thread = getattr(inner, "thread", None)
    if isinstance(thread, threading.Thread):  # A plain handler has a thread.
        return innermost_line(thread)
    frame = _innermost(items) or _innermost(inner) or _innermost(task.get_coro())
    return "an unknown line" if frame is None else _line(frame)


def innermost_line(thread: threading.Thread) -> str:
    """Return the current line of a thread, in the user's code if there is any, as `file:line in function`."""
    frame: FrameType | None = sys._current_frames().get(thread.ident or 0)
    first = frame
    while frame is not None and not _is_users(frame):
        frame = frame.f_back
    frame = frame or first
    return "its end" if frame is None else _line(frame)


def _line(frame: FrameType) -> str:
    return f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}"


def _is_users(frame: FrameType) -> bool:
    """Whether the frame belongs neither to this package nor to the standard library."""
    name = frame.f_code.co_filename
    ours = name.startswith((_PACKAGE, "<frozen "))
    return not ours and ("site-packages" in name or not name.startswith(_STANDARD_LIBRARY))


def _innermost(step: Any) -> FrameType | None:
    """Return the innermost frame of the user's code in a chain of awaits."""
    found = None
    while step is not None:
        frame = _first(step, "ag_frame", "cr_frame", "gi_frame")
        following = _first(step, "ag_await", "cr_await", "gi_yieldfrom")
        if frame is not None:
            if frame.f_code.co_filename.startswith(_PACKAGE):
                if type(following).__name__ in _STEPS:  # It hides the user's generator, the local `items`.
                    following = frame.f_locals.get("items")
            elif _is_users(frame):
                found = frame
        step = following
    return found


def _first(step: Any, *names: str) -> Any:
    return next((found for name in names if (found := getattr(step, name, None)) is not None), None)
