"""The request on each line of the log: its id, the endpoint and the instance of its handler, and its trace."""

from __future__ import annotations

import logging
import sys

from triton_distributed.context import current, served_by
from triton_distributed.observe.traceparent import TraceParent, parse


class LogContext(logging.Filter):
    """Adds `request_id`, `endpoint`, `instance_id`, `traceparent`, `trace_id` and `span_id` to records; it drops none.

    Each is text: `-` where no handler of a request runs, and for a request without a trace. `trace_id` and `span_id`
    are those of OpenTelemetry's current span, or else of the `traceparent`. Fields that a record has already stay, for
    example those of `extra=`. The filter belongs on the logging handlers that format or queue records, see
    `log_requests`. By its class it can be named in `logging.config.dictConfig`.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        context = current.get()
        served = served_by.get()
        if context is None or served is None:
            traceparent, fields = None, ("-", "-", "-")
        else:
            traceparent = context.travelling.get("traceparent")
            fields = (context.id(), served.endpoint, str(served.instance_id))
        ids = trace_ids(traceparent) or ("-", "-")
        for name, text in zip(FIELDS, (*fields, str(traceparent or "-"), *ids), strict=True):
            record.__dict__.setdefault(name, text)
        return True


FIELDS = ("request_id", "endpoint", "instance_id", "traceparent", "trace_id", "span_id")
"""The fields that `LogContext` adds."""


def trace_ids(traceparent: object) -> TraceParent | None:
    """The ids of OpenTelemetry's current span, if the program has one; else those in a `traceparent`."""
    api = sys.modules.get("opentelemetry.trace")
    if api is not None and hasattr(api, "get_current_span"):  # Another thread may be importing it now.
        span = api.get_current_span().get_span_context()
        if span.is_valid:
            return TraceParent(f"{span.trace_id:032x}", f"{span.span_id:016x}")
    return parse(traceparent)


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
