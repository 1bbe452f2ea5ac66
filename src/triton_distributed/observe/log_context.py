"""The request on each line of the log: its id, the endpoint and the instance whose handler wrote the line."""

from __future__ import annotations

import logging

from triton_distributed.context import current, served_by


class LogContext(logging.Filter):
    """Adds `request_id`, `endpoint`, `instance_id` and `traceparent` to log records; it drops none.

    Each is text: `-` where no handler of a request runs, and for a request without a `traceparent`. Fields that a
    record has already stay, for example those of `extra=`. The filter belongs on the logging handlers that format or
    queue records, see `log_requests`. By its class it can be named in `logging.config.dictConfig`.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        context = current.get()
        served = served_by.get()
        if context is None or served is None:
            fields = _NONE
        else:
            traceparent = context.travelling.get("traceparent", "-")
            fields = (context.id(), served.endpoint, str(served.instance_id), str(traceparent))
        for name, text in zip(FIELDS, fields, strict=True):
            record.__dict__.setdefault(name, text)
        return True


FIELDS = ("request_id", "endpoint", "instance_id", "traceparent")
"""The fields that `LogContext` adds."""
_NONE = ("-",) * len(FIELDS)


def log_requests(target: logging.Handler | logging.Logger | None = None) -> None:
    """Add a `LogContext` to a logging handler. A handler that has one gets no second one.

    Args:
        target: the handler, or a logger for all of its handlers; by default the root logger. A filter on a logger
            itself would miss the records of the loggers below it.

    Raises:
        TypeError: the target is neither.
        ValueError: the logger has no handler yet.
    """
    if isinstance(target, logging.Handler):
        handlers = [target]
    elif target is None or isinstance(target, logging.Logger):
        logger = target or logging.getLogger()
        handlers = list(logger.handlers)
        if not handlers:
            words = f"logger {logger.name!r} has no handlers: call it after logging.basicConfig(…) or dictConfig(…)"
            raise ValueError(f"log_requests: {words}")
    else:
        raise TypeError(f"log_requests({target!r}): must be a logging.Handler, a logging.Logger, or None")
    for handler in handlers:
        if not any(isinstance(each, LogContext) for each in handler.filters):
            handler.addFilter(LogContext())
