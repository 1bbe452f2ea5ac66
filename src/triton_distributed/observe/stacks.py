"""Attributes a stack to the code that occupies the loop: a program, a library, the loop or this package."""

from __future__ import annotations

import asyncio
import os
import traceback
from collections.abc import Sequence
from types import CodeType, FrameType
from typing import NamedTuple

DEEPEST = 40
"""Number of frames of a stack that are logged, the innermost ones."""

_HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_STDLIB = os.path.join(os.path.dirname(os.__file__), "")
_PACKAGES = tuple(f"{os.sep}{name}{os.sep}" for name in ("site-packages", "dist-packages"))
_LOOPS = tuple(f"{os.sep}{name}{os.sep}" for name in ("asyncio", "uvloop"))
_RUN_CALLBACK = asyncio.Handle._run.__code__
_RUN_ONCE = asyncio.BaseEventLoop._run_once.__code__  # type: ignore[attr-defined]
# Libraries that run on the loop for this package without a call by a handler.
_SERVANTS = tuple(package + "nats" + os.sep for package in _PACKAGES)
_RUNTIME = tuple(os.path.join(_HERE, room, "") for room in ("runtime", "serving", "calling"))

Place = tuple[CodeType, int]  # code, and the offset of the current instruction


def loop_place(caller: FrameType) -> Place | None:
    """Return the place that runs a loop written in C; None if the loop is visible in the stack.

    Args:
        caller: the frame that called a callback of the loop.
    """
    return None if caller.f_code is _RUN_CALLBACK else place_of(caller)


def place_of(frame: FrameType) -> Place:
    """Return the place of a frame; it stays the same during one call."""
    return frame.f_code, frame.f_lasti


def callback(frame: FrameType, loop: Place | None) -> list[FrameType] | None:
    """Return the frames of the callback that an event loop runs, innermost first; None if it runs none.

    Args:
        frame: the innermost frame of the loop's thread.
        loop: the result of `loop_place`.
    """
    found: list[FrameType] = []
    each: FrameType | None = frame
    while each is not None:
        if loop is not None and place_of(each) == loop:
            return found or None
        if each.f_code is _RUN_CALLBACK:
            return found
        if each.f_code is _RUN_ONCE:
            return None  # the loop polls or waits
        found.append(each)
        each = each.f_back
    code = frame.f_code
    return None if code.co_name == "select" and code.co_filename.endswith("selectors.py") else found


class Blame(NamedTuple):
    """The code that a callback is executing.

    Attributes:
        file, line, function: the innermost place in the program's own code; without one in a library's, then in any.
        theirs: True if that place, or code called from it, is executing; False for the loop or this package.
    """

    file: str
    line: int
    function: str
    theirs: bool

    def __str__(self) -> str:
        return f"{self.file}:{self.line} in {self.function}"


def blame(frames: Sequence[FrameType]) -> Blame:
    """Find the code that is responsible for a callback.

    Args:
        frames: frames of the callback, innermost first; at least one.
    """
    own: FrameType | None = None
    library: FrameType | None = None
    for each in frames:
        file = each.f_code.co_filename
        if file.startswith(_HERE):
            # The runtime calls handlers, which may be installed like a library. The rest of this package calls
            # libraries for itself.
            if own is None and library is not None and file.startswith(_RUNTIME):
                return _blamed(library, True)
            own = own or each
        elif any(part in file for part in _LOOPS + _SERVANTS) or file.startswith("<frozen"):
            continue
        elif any(part in file for part in _PACKAGES):
            library = library or each
        elif not file.startswith(_STDLIB):
            return _blamed(each, own is None)
    if own is not None:
        return _blamed(own, False)
    return _blamed(frames[0], False) if library is None else _blamed(library, True)


def _blamed(frame: FrameType, theirs: bool) -> Blame:
    return Blame(frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name, theirs)


def stack(frame: FrameType) -> str:
    """Format a stack like a traceback."""
    summary = traceback.StackSummary.extract(traceback.walk_stack(frame), limit=DEEPEST)
    summary.reverse()
    return "".join(summary.format()).rstrip()
