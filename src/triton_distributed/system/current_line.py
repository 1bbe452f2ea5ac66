"""Where a handler stands: the line of the user's code that a task is suspended at."""

from __future__ import annotations

import asyncio
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

_PACKAGE = str(Path(__file__).parent.parent)

_STEPS = ("async_generator_asend", "async_generator_athrow")
"""What a task awaits while it iterates over an async generator."""

_STANDARD_LIBRARY = str(Path(asyncio.__file__).parent.parent)


def standing(task: asyncio.Task[Any] | None, items: object) -> str:
    """Return the innermost line of the user's code, as `file:line in function`.

    Args:
        task: the task that serves a request.
        items: the async iterator of what its handler makes. An async generator cannot be found through the task.
    """
    if task is None or task.done():
        return "nowhere: it has ended"
    inner = getattr(items, "inner", None)
    thread = getattr(inner, "thread", None)
    if isinstance(thread, threading.Thread):  # of a plain handler
        return innermost_line(thread)
    frame = _innermost(items) or _innermost(inner) or _innermost(task.get_coro())
    return "code that cannot be seen" if frame is None else _line(frame)


def innermost_line(thread: threading.Thread) -> str:
    """Return the line that a thread stands at, the user's code if there is any, as `file:line in function`."""
    frame: FrameType | None = sys._current_frames().get(thread.ident or 0)
    first = frame
    while frame is not None and not _is_users(frame):
        frame = frame.f_back
    frame = frame or first
    return "nowhere: it has ended" if frame is None else _line(frame)


def _line(frame: FrameType) -> str:
    return f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}"


def _is_users(frame: FrameType) -> bool:
    """Whether it is a frame neither of this package nor of the standard library."""
    name = frame.f_code.co_filename
    ours = name.startswith((_PACKAGE, "<frozen "))
    return not ours and ("site-packages" in name or not name.startswith(_STANDARD_LIBRARY))


def _innermost(step: Any) -> FrameType | None:
    """The innermost frame that is neither of this package nor of the standard library, in a chain of awaits."""
    found = None
    while step is not None:
        frame = _first(step, "ag_frame", "cr_frame", "gi_frame")
        following = _first(step, "ag_await", "cr_await", "gi_yieldfrom")
        if frame is not None:
            if frame.f_code.co_filename.startswith(_PACKAGE):
                if type(following).__name__ in _STEPS:  # they hide the user's generator, which ours call `items`
                    following = frame.f_locals.get("items")
            elif _is_users(frame):
                found = frame
        step = following
    return found


def _first(step: Any, *names: str) -> Any:
    return next((found for name in names if (found := getattr(step, name, None)) is not None), None)
