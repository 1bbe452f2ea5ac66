"""Spans as Dynamo's programs see them: those of OpenTelemetry, if the program uses it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, Self

from triton_distributed.observe.traces import NAME


class SpanProxy:
    """A span of OpenTelemetry. Without OpenTelemetry in the program it records nothing.

    In a `with` block a started span is the current one, and it ends with the block.

    Args:
        span: the span; None to record nothing.
        started: the program has started it, so it ends with `close`.
    """

    def __init__(self, span: Any = None, started: bool = False) -> None:
        self._span = span
        self._started = started
        self._use: Any = None

    def set_attribute(self, key: str, value: Any) -> None:
        """Set an attribute."""
        if self._span is not None:
            self._span.set_attribute(key, value)

    def add_event(self, name: str, attrs: Mapping[str, Any] | None = None) -> None:
        """Add an event, at this moment."""
        if self._span is not None:
            self._span.add_event(name, attrs)

    def set_status(self, status: str, description: str | None = None) -> None:
        """Set the status: `ok` or `error`, in upper or lower case; any other text unsets it."""
        if self._span is not None:
            code = sys.modules["opentelemetry.trace"].StatusCode
            known = {"ok": code.OK, "error": code.ERROR}.get(str(status).lower(), code.UNSET)
            self._span.set_status(known, description if known is code.ERROR else None)

    def close(self) -> None:
        """End the span if the program has started it. Closing it twice has no further effect."""
        if self._started:
            self._started = False
            self._span.end()

    def __enter__(self) -> Self:
        if self._started:
            self._use = sys.modules["opentelemetry.trace"].use_span(self._span)
            self._use.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        use, self._use = self._use, None
        try:
            if use is not None:
                use.__exit__(*exception)  # It records the error, and raises it again.
        finally:
            self.close()


def current_span() -> SpanProxy:
    """The current span: that of the request, unless the program has begun one."""
    api = sys.modules.get("opentelemetry.trace")
    return SpanProxy() if api is None else SpanProxy(api.get_current_span())


def start_span(name: str, attrs: Mapping[str, Any] | None) -> SpanProxy:
    """Start a span below the current one."""
    api = sys.modules.get("opentelemetry.trace")
    return SpanProxy() if api is None else SpanProxy(api.get_tracer(NAME).start_span(name, attributes=attrs), True)
