"""Tracebacks of handlers' errors, without the frames of this package, which do not help the user."""

from __future__ import annotations

import re
from traceback import StackSummary, TracebackException

PACKAGE = re.sub(r"payload[/\\]\w+\.pyc?\Z", "", __file__)
"""The prefix of the file names of this package's own frames."""

COMPILED = "triton_distributed/"
"""The prefix of the file names of its compiled functions."""


def trace_of(error: BaseException, *, full: bool = False) -> TracebackException:
    """Return an error's traceback and those of its causes, contexts and parts, ready to be formatted.

    Args:
        error: the error.
        full: keep the frames of this package. Otherwise an error without other frames has only its last line.
    """
    trace = TracebackException(type(error), error, error.__traceback__, compact=True)
    if not full:
        waiting: list[TracebackException | None] = [trace]
        while waiting:
            if (each := waiting.pop()) is not None:
                frames = [frame for frame in each.stack or () if not frame.filename.startswith((PACKAGE, COMPILED))]
                each.stack = StackSummary.from_list(frames) if frames else None  # type: ignore[assignment]
                waiting += (each.__cause__, each.__context__, *(each.exceptions or ()))
    return trace


def traceback_text(error: BaseException, *, full: bool = False) -> str:
    """Return an error's traceback as text. Never raises, even if the error's own methods raise."""
    try:
        return "".join(trace_of(error, full=full).format())
    except Exception as problem:  # The `__str__` of a user's exception may fail.
        return no_traceback(problem)


def no_traceback(problem: Exception) -> str:
    """Return a text that replaces a traceback that cannot be made."""
    return f"(its traceback cannot be made: {type(problem).__name__})\n"
