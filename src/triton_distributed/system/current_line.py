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
    """Return the innermost line of the user's code, as `file:line in function`; see `steps` for all of them.

    Args:
        task: the task that serves a request.
        items: the handler's async iterator of items. An async generator cannot be found through the task.
    """
    found = steps(task, items)
    return found[-1] if found else "its end" if task is None or task.done() else "an unknown line"


def steps(task: asyncio.Task[Any] | None, items: object) -> list[str]:
    """Return the lines of the user's code at which a handler stands, outermost first, as `file:line in function`.

    Args:
        task, items: see `standing`.
    """
    if task is None or task.done():
        return []
    inner = getattr(items, "inner", None)
    thread = getattr(inner, "thread", None)
    if isinstance(thread, threading.Thread):  # A plain handler has a thread.
        return _lines_of(thread)
    running = getattr(items, "running", None)
    frames = _awaiting(items) or _awaiting(inner) or _awaiting(running) or _awaiting(task.get_coro())
    return [_line(frame) for frame in frames]


def innermost_line(thread: threading.Thread) -> str:
    """Return the current line of a thread, in the user's code if there is any, as `file:line in function`."""
    found = _lines_of(thread)
    return found[-1] if found else "its end"


def _lines_of(thread: threading.Thread) -> list[str]:
    """The lines of a thread, outermost first: those in the user's code, or the innermost one if none is."""
    frame: FrameType | None = sys._current_frames().get(thread.ident or 0)
    found, first = [], frame
    while frame is not None:
        if _is_users(frame):
            found.append(_line(frame))
        frame = frame.f_back
    if not found and first is not None:
        return [_line(first)]
    return found[::-1]


def _line(frame: FrameType) -> str:
    return f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}"


def _is_users(frame: FrameType) -> bool:
    """Whether the frame belongs neither to this package nor to the standard library."""
    name = frame.f_code.co_filename
    ours = name.startswith((_PACKAGE, "<frozen "))
    return not ours and ("site-packages" in name or not name.startswith(_STANDARD_LIBRARY))


def _awaiting(step: Any) -> list[FrameType]:
    """Return the frames of the user's code in a chain of awaits, outermost first."""
    found = []
    while step is not None:
        frame = _first(step, "ag_frame", "cr_frame", "gi_frame")
        following = _first(step, "ag_await", "cr_await", "gi_yieldfrom")
        if frame is not None:
            if frame.f_code.co_filename.startswith(_PACKAGE):
                if type(following).__name__ in _STEPS:  # It hides the user's generator, the local `items`.
                    following = frame.f_locals.get("items")
            elif _is_users(frame):
                found.append(frame)
        step = following
    return found


def _first(step: Any, *names: str) -> Any:
    return next((found for name in names if (found := getattr(step, name, None)) is not None), None)
