"""The context of a request as Dynamo's programs see it: live metadata, a future for the stop, trace headers."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Iterator, Mapping, MutableMapping
from types import MappingProxyType
from typing import Any

from triton_distributed import context as native
from triton_distributed.compat.dynamo.spans import SpanProxy, current_span, start_span
from triton_distributed.context import AwaitedRequest
from triton_distributed.observe.log_context import trace_ids
from triton_distributed.observe.traceparent import TraceParent, parse

_NOTHING: Mapping[str, Any] = MappingProxyType({})


class ContextMetadata(MutableMapping[str, str]):
    """Text by name that travels with each call made with the context. It may be changed at any time."""

    def __init__(self, values: Mapping[str, str] | None = None) -> None:
        self._values: dict[str, str] = {}
        self.update(values or {})

    def __getitem__(self, key: str) -> str:
        return self._values[key]

    def __setitem__(self, key: Any, value: Any) -> None:
        if not isinstance(key, str) or not isinstance(value, str):
            raise TypeError(f"metadata[{key!r}] = {value!r}: names and values are text")
        self._values[key] = value

    def __delitem__(self, key: str) -> None:
        del self._values[key]

    def __len__(self) -> int:
        return len(self._values)

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def copy(self) -> dict[str, str]:
        """The present values as a dict of their own."""
        return dict(self._values)

    def __repr__(self) -> str:
        return json.dumps(self._values)


class _Watch:
    """Completes a future when a context is stopped or killed."""

    def __init__(self, future: asyncio.Future[bool]) -> None:
        self._future = future

    def ask_to_stop(self) -> None:
        if not self._future.done():
            self._future.set_result(True)

    cancel = ask_to_stop

    def waits_for(self) -> AwaitedRequest | None:
        return None


class Context:
    """A request that is being served, or the handle of a caller's request.

    Args:
        id: the request's id; a random UUID by default.
        metadata: text that travels with the request.
    """

    def __init__(self, id: str | None = None, metadata: Mapping[str, str] | None = None) -> None:
        self._set(native.Context(str(uuid.uuid4()) if id is None else id), ContextMetadata(metadata))

    @classmethod
    def of(cls, served: native.Context) -> Context:
        """The context that a handler gets."""
        context = cls.__new__(cls)
        metadata = ContextMetadata()
        metadata._values.update(served.metadata)  # A caller with the native API may have sent other values than text.
        served.metadata = _NOTHING  # The metadata of a nested call is what is here when the call is made.
        context._set(served, metadata)
        return context

    def _set(self, inner: native.Context, metadata: ContextMetadata) -> None:
        self.native = inner
        self._metadata = metadata
        try:
            self._loop: asyncio.AbstractEventLoop | None = asyncio.get_running_loop()
        except RuntimeError:
            self._loop = None
        self.stopped_here = False

    def id(self) -> str:
        """The request's id."""
        return self.native.id()

    @property
    def metadata(self) -> ContextMetadata:
        """The metadata; it may be changed, and replaced by a dict."""
        return self._metadata

    @metadata.setter
    def metadata(self, values: Mapping[str, str]) -> None:
        self._metadata = ContextMetadata(values)

    def is_stopped(self) -> bool:
        """Whether the request shall end: its caller has stopped it or has left."""
        return self.stopped_here or self.native.is_stopped()

    def is_killed(self) -> bool:
        """Whether the caller was lost or its deadline has passed."""
        return self.native.is_killed()

    def stop_generating(self) -> None:
        """End the streams of the calls made with this context, and tell their handlers. May be called in any thread."""
        self.stopped_here = True
        try:
            here: asyncio.AbstractEventLoop | None = asyncio.get_running_loop()
        except RuntimeError:
            here = None
        if self._loop is None or here is self._loop:
            self.native.stop_generating()
        elif not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self.native.stop_generating)

    def async_killed_or_stopped(self) -> asyncio.Future[bool]:
        """A future that is done, with True, when the context is stopped or killed."""
        future: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        if self.is_stopped():
            future.set_result(True)
        else:
            watch = _Watch(future)
            self.native.attach(watch)
            future.add_done_callback(lambda _: self.native.detach(watch))
        return future

    def detached(self, id: str) -> Context:
        """A context of its own, with a copy of the metadata: it is not stopped with this one."""
        context = Context(id, self._metadata)
        context.native = self.native.detached(id)
        context.native.metadata = _NOTHING
        return context

    def notify_first_token(self) -> None:
        """Do nothing: this runtime has no work that waits for the first token."""

    # Trace context: the W3C headers among the values that travel, or in the metadata.

    def trace_headers(self) -> dict[str, str] | None:
        """`traceparent` and the other headers that the caller has sent; None without a `traceparent`."""
        known = {**self.native.travelling, **self._metadata}
        names = ("traceparent", "tracestate", "x-request-id", "request-id")
        found = {name: str(value) for name in names if (value := known.get(name))}
        return found if "traceparent" in found else None

    def _ids(self) -> TraceParent | None:
        return trace_ids((self.trace_headers() or {}).get("traceparent"))

    @property
    def trace_id(self) -> str | None:
        """The trace id of the current span, else of the caller's `traceparent`, else None."""
        ids = self._ids()
        return None if ids is None else ids.trace_id

    @property
    def span_id(self) -> str | None:
        """The id of the current span, else of the one in the caller's `traceparent`, else None."""
        ids = self._ids()
        return None if ids is None else ids.span_id

    @property
    def parent_span_id(self) -> str | None:
        """The id of the caller's span, if there is a current span; else None."""
        sent = parse((self.trace_headers() or {}).get("traceparent"))
        return None if sent is None or trace_ids(None) is None else sent.span_id

    def current_span(self) -> SpanProxy:
        """The current span; see `SpanProxy`."""
        return current_span()

    def start_span(self, name: str, attrs: Mapping[str, Any] | None = None) -> SpanProxy:
        """Start a span below the current one, for a `with` block or until its `close`; see `SpanProxy`."""
        return start_span(name, attrs)

    def __repr__(self) -> str:
        state = "killed" if self.is_killed() else "stopped" if self.is_stopped() else "running"
        return f"<Context {self.id()} {state}>"
