"""Spans of OpenTelemetry: one for each call, one for each request at a worker, and one for its wait in the queue."""

from __future__ import annotations

from collections.abc import Mapping
from time import time_ns
from typing import TYPE_CHECKING, Any, NamedTuple

from triton_distributed import __version__
from triton_distributed.errors import RemoteError
from triton_distributed.observe.observer import (
    CallEnd,
    CallObserver,
    CallStart,
    Observer,
    RequestEnd,
    RequestObserver,
    RequestStart,
)
from triton_distributed.payload.tracebacks import traceback_text

if TYPE_CHECKING:
    from opentelemetry.context.context import Context as Variables
    from opentelemetry.trace import Span, SpanKind, StatusCode, TracerProvider

NAME = "triton_distributed"
"""The name of the tracer, and of the RPC system in the spans."""

SERVERS_FAULT = frozenset({"error", "deadline"})
"""The outcomes that make the span of a request an error. The others are the caller's doing, as in gRPC's spans."""

NO_FAULT = frozenset({"ok", "cancelled"})
"""The outcomes that do not make the span of a call an error."""


class Traces(Observer):
    """Makes spans with OpenTelemetry, and lets their contexts travel with the calls.

    A runtime adds one by itself if the program has configured OpenTelemetry's SDK when it first serves an endpoint or
    makes a client, unless `TRD_TRACES` is off. A program that configures it later, or uses a provider of its own, adds
    this: `here.observers.add(trd.Traces(provider))`.

    Args:
        provider: makes the tracer; by default the provider of the process.
        full_tracebacks: recorded tracebacks keep the frames of this package.

    Raises:
        ImportError: OpenTelemetry is not installed; `pip install triton-distributed[otel]` installs it.
    """

    def __init__(self, provider: TracerProvider | None = None, *, full_tracebacks: bool = False) -> None:
        try:
            from opentelemetry import context, propagate, trace
        except ImportError as error:
            raise ImportError("Traces needs OpenTelemetry: pip install triton-distributed[otel]") from error
        self.api = _Api(context, propagate, trace)
        self.tracer = trace.get_tracer(NAME, __version__, provider)
        self.full_tracebacks = full_tracebacks

    def call(self, start: CallStart) -> CallObserver | None:
        context, _, trace = self.api
        here = context.get_current()
        if not trace.get_current_span(here).get_span_context().is_valid:
            here = self.extracted(start.travelling, here)
        attributes = {"triton.hedge": True} if start.hedge else {}
        span = self.span(start.endpoint, trace.SpanKind.CLIENT, here, attributes)
        return _Call(self, span, here)

    def request(self, start: RequestStart) -> RequestObserver | None:
        # A new context: a span in which the program serves the endpoint is not the parent of its requests.
        parent = self.extracted(start.context.travelling, self.api.context.Context())
        attributes = {"triton.instance_id": str(start.instance_id), "triton.request_id": start.context.id()}
        span = self.span(start.endpoint, self.api.trace.SpanKind.SERVER, parent, attributes)
        return _Request(self, span, parent)

    def extracted(self, travelling: Mapping[str, Any], context: Variables) -> Variables:
        """The context of the trace that travels with a call or a request, over `context`."""
        texts = {name: value for name, value in travelling.items() if isinstance(value, str)}
        return self.api.propagate.extract(texts, context) if texts else context

    def span(self, endpoint: str, kind: SpanKind, parent: Variables, attributes: dict[str, Any]) -> Span:
        """Start the span of a call or a request."""
        attributes["rpc.system.name"] = NAME
        attributes["rpc.method"] = endpoint
        return self.tracer.start_span(endpoint, parent, kind, attributes)

    def end(self, span: Span, end: CallEnd | RequestEnd, failed: bool, traceback: str | None) -> None:
        """End a span with the outcome, and with the error if there was one."""
        if span.is_recording():
            status: type[StatusCode] = self.api.trace.StatusCode
            error = end.error
            span.set_attribute("rpc.response.status_code", end.outcome)
            if end.timing.first_item_s is not None:
                span.set_attribute("triton.first_item_s", end.timing.first_item_s)
            if failed:
                span.set_attribute("error.type", end.outcome if error is None else _type_name(error))
                span.set_status(status.ERROR, end.outcome if error is None else _words(error))
            if error is not None and traceback is not None:
                event = {"exception.type": _type_name(error), "exception.message": _words(error)}
                if traceback:
                    event["exception.stacktrace"] = traceback
                span.add_event("exception", event)
        span.end()


class _Api(NamedTuple):
    """The modules of OpenTelemetry's API."""

    context: Any
    propagate: Any
    trace: Any


class _Call(CallObserver):
    def __init__(self, traces: Traces, span: Span, parent: Variables) -> None:
        self._traces = traces
        self._span = span
        carrier: dict[str, str] = {}
        traces.api.propagate.inject(carrier, traces.api.trace.set_span_in_context(span, parent))
        self.travelling = carrier

    def attempt_failed(self, instance_id: int, reason: str, again: bool) -> None:
        self._span.add_event(
            "attempt failed",
            {"triton.instance_id": str(instance_id), "triton.reason": reason, "triton.again": again},
        )

    def ended(self, end: CallEnd) -> None:
        span = self._span
        if end.request_id:
            span.set_attribute("triton.request_id", end.request_id)
        if end.instance_id is not None:
            span.set_attribute("triton.instance_id", str(end.instance_id))
        failed = end.outcome not in NO_FAULT
        self._traces.end(span, end, failed, "" if failed else None)


class _Request(RequestObserver):
    def __init__(self, traces: Traces, span: Span, parent: Variables) -> None:
        self._traces = traces
        self._span = span
        self._context = traces.api.trace.set_span_in_context(span, parent)
        self._came_ns = time_ns()

    def began(self) -> None:
        traces = self._traces
        if self._span.is_recording():
            traces.tracer.start_span("queue", self._context, start_time=self._came_ns).end()
        traces.api.context.attach(self._context)  # The handler's task ends with this context, so nothing detaches it.

    def ended(self, end: RequestEnd) -> None:
        error = end.error
        text = None if error is None else traceback_text(error, full=self._traces.full_tracebacks)
        self._traces.end(self._span, end, end.outcome in SERVERS_FAULT, text)


def _type_name(error: BaseException) -> str:
    cause = RemoteError.cause_of(error)
    return type(error).__qualname__ if cause is None else cause.type_name


def _words(error: BaseException) -> str:
    try:
        return str(error)
    except Exception as problem:  # The `__str__` of a user's exception may fail.
        return f"(its text cannot be made: {type(problem).__name__})"
