"""Log entries for errors, with tracebacks that leave this package's own frames out."""

from __future__ import annotations

import logging
from types import TracebackType

from triton_distributed.payload.tracebacks import traceback_text


def log_error(logger: logging.Logger, level: int, error: BaseException, full: bool, text: str, *values: object) -> None:
    """Log `text % values` and an error's traceback, as `exc_info=error` would.

    Args:
        full: the traceback keeps the frames of this package.
    """
    if not logger.isEnabledFor(level):
        return
    file, line, function, _ = logger.findCaller(stacklevel=2)
    info: tuple[type[BaseException], BaseException, TracebackType | None] = (type(error), error, error.__traceback__)
    record = logger.makeRecord(logger.name, level, file, line, text, values, info, function)
    record.exc_text = traceback_text(error, full=full).rstrip("\n")  # Formatters write this text for `exc_info`.
    logger.handle(record)
