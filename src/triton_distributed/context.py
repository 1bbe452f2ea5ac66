"""The context of a request: a handler learns about its request from it, and a caller controls calls with it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

from triton_distributed.names import EndpointName

__all__: list[str] = []  # Programs import these names from `triton_distributed.runtime`.


# Keys that the runtime adds to a request's metadata; a user's own key cannot begin with a NUL.
ID, PRIORITY, RESUME, TRAVELLING = "\0id", "\0p", "\0r", "\0t"
LOWEST_PRIORITY, HIGHEST_PRIORITY = -128, 127
CLEANUP_S = 30.0
"""Seconds after a handler's cancellation in which the calls of its clean-up may run.

The value equals the default of `TRD_DRAIN_TIMEOUT_S`: time to release a slot, a lock or a cache block elsewhere."""


class AwaitedRequest(NamedTuple):
    """A request whose answer is awaited.

    Attributes:
        endpoint: the endpoint that was called.
        instance_id: the worker that has the request or is about to get it.
        sent: the nonce of the request's session and the id of its stream, if the request was sent.
    """

    endpoint: EndpointName
    instance_id: int
    sent: tuple[int, int] | None


class AttachedCall(Protocol):
    """A call made on behalf of a context."""

    def cancel(self) -> None: ...

    def ask_to_stop(self) -> None: ...

    def waits_for(self) -> AwaitedRequest | None:
        """The request that the call waits for; None before an instance was chosen."""


class Context:
    """The request being served, or a handle that the caller passes to `generate(…, context=)`.

    Args:
        id: names the request in logs and errors. By default it is random, or in a handler the id of its request.
        metadata: plain values by name, for the handler that is called.
        travelling: plain values by name, for that handler and for all that it calls in turn, e.g. a user's id, or
            `traceparent` and `tracestate` of W3C Trace Context.

    A handler gets one as its second parameter. Calls that a handler makes inherit its deadline, its priority, its id
    and its travelling values, and are cancelled together with it. A handler that passes its context to a call also
    passes on the metadata. Calls that a handler's clean-up makes after such a cancellation still run: see `CLEANUP_S`.
    For calls that outlive the request, use `detached()`.

    Raises:
        TypeError: the id is not text, or the metadata or the travelling values are not a mapping.
    """

    # The defaults are class attributes: every request makes a context, and few requests change any of them.
    metadata: Mapping[str, Any] = MappingProxyType({})
    travelling: Mapping[str, Any] = MappingProxyType({})
    carried: tuple[Mapping[str, Any], bytes] | None = None  # Metadata of its calls, see `runtime.metadata`.
    deadline: float | None = None  # The request's, in seconds on the event loop's clock.
    calls_deadline: float | None = None  # The handler's own calls': `deadline`, or later during clean-up.
    priority: int = 0  # Where requests wait, those with larger priorities begin first.
    over = False  # The request was answered. Work that its handler left running no longer belongs to it.
    independent = False  # Calls made with it inherit nothing of the request in whose handler they are made.
    resume_token: Any = None  # The last token of an earlier instance's `checkpoint`; None: start anew.
    _id: str | None = None
    _pending_token: bytes | None = None
    _stopped = False
    _killed = False
    _waiters: list[asyncio.Future[None]] | None = None
    _calls: dict[AttachedCall, None] | None = None  # In the order of their start; bounded by the open calls.

    def __init__(
        self,
        id: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        travelling: Mapping[str, Any] | None = None,
    ) -> None:
        if id is not None:
            if not isinstance(id, str):
                raise TypeError(f"id={id!r}: the id of a context must be a str")
            self._id = id
        if metadata is not None:
            self.metadata = read_only(metadata, "metadata")
        if travelling is not None:
            self.travelling = read_only(travelling, "travelling")

    def id(self) -> str:
        """The request's id."""
        if self._id is None:
            serving = None if self.independent else current.get()
            self._id = os.urandom(16).hex() if serving is None or serving.over else serving.id()
        return self._id

    def travel(self, /, **values: Any) -> None:
        """Add values that travel: calls made with this context from now on carry them, and so do all calls below them.

        In a handler these are the handler's own calls. A value replaces an earlier one of its name.

        Args:
            values: plain values. A call raises TypeError for one that cannot be encoded.
        """
        self.travelling = MappingProxyType({**self.travelling, **values})

    def remaining_s(self) -> float | None:
        """Seconds until the deadline, never below 0; None without a deadline."""
        if self.deadline is None:
            return None
        return max(0.0, self.deadline - self.now())

    def now(self) -> float:
        """Return the time in seconds on the clock of `deadline`. A handler may ask in any thread."""
        return asyncio.get_running_loop().time()

    def checkpoint(self, token: Any) -> None:
        """Attach a resume token to the next item. If a call with `resume=True` loses this instance after that item, it
        continues on another instance, which finds the token in `resume_token`. Outside of a request this does nothing.

        Args:
            token: any plain value that says where the stream continues after the next item, up to 64 KiB encoded.

        Raises:
            TypeError: the token holds something that cannot travel.
            ValueError: the token is too large.
        """

    def take_token(self) -> bytes | None:
        """Take the token that the handler's thread passed to `checkpoint` since the last item."""
        token = self._pending_token
        if token is not None:
            self._pending_token = None
        return token

    def attach_token(self, token: bytes) -> None:
        """Attach this encoded token to the next item. Runs in the loop's thread."""

    def detached(self, id: str | None = None) -> Context:
        """A new context with the same metadata and travelling values, for calls that do not belong to this request.

        Calls made with it in a handler inherit neither its deadline, its priority nor its cancellation.

        Args:
            id: the new context's id; random by default.

        Raises:
            TypeError: the id is not text.
        """
        context = Context(os.urandom(16).hex() if id is None else id, self.metadata, self.travelling)
        context.independent = True
        return context

    def is_stopped(self) -> bool:
        """Whether the handler should finish by itself: the caller asked for that, or is gone."""
        return self._stopped

    def is_killed(self) -> bool:
        """Whether the request was cancelled: its caller left or its time is over."""
        return self._killed

    def stop_generating(self) -> None:
        """Ask the handler, and every call made with this context, to finish by itself."""
        self._stopped = True
        for call in list(self._calls or ()):
            call.ask_to_stop()
        self._wake()

    def kill(self) -> None:
        """Cancel every call made with this context, and every call that is made with it later."""
        self._stopped = self._killed = True
        for call in list(self._calls or ()):
            call.cancel()
        self._wake()

    async def stopped(self) -> None:
        """Wait until `is_stopped()`."""
        if not self._stopped:
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            if self._waiters is None:
                self._waiters = []
            self._waiters.append(waiter)
            await waiter

    async_killed_or_stopped = stopped

    def _wake(self) -> None:
        for waiter in self._waiters or ():
            if not waiter.done():
                waiter.set_result(None)
        self._waiters = None

    def attach(self, call: AttachedCall) -> None:
        """Register a call made on behalf of this context."""
        if self._calls is None:
            self._calls = {}
        self._calls[call] = None
        if self._killed:
            call.cancel()
        elif self._stopped:
            call.ask_to_stop()

    def detach(self, call: AttachedCall) -> None:
        """Forget a call that has ended."""
        if self._calls is not None:
            self._calls.pop(call, None)

    def __repr__(self) -> str:
        state = "killed" if self._killed else "stopped" if self._stopped else "running"
        return f"<Context {self._id or 'unnamed'} {state}>"


def read_only(values: object, name: str) -> Mapping[str, Any]:
    """Return a read-only copy of the metadata or the travelling values of a request.

    Raises:
        TypeError: the values are not a mapping; `name` is the argument's name.
    """
    if not isinstance(values, Mapping):
        raise TypeError(f"{name}={values!r}: must be a mapping of names to plain values")
    return MappingProxyType(dict(values))


def awaited_requests(context: Context) -> list[AwaitedRequest]:
    """Return the requests that the open calls of a context wait for."""
    return [awaited for call in context._calls or () if (awaited := call.waits_for()) is not None]


current: ContextVar[Context | None] = ContextVar("triton_distributed_context", default=None)


class ServedBy(NamedTuple):
    """The instance whose handler runs.

    Attributes:
        endpoint: the name of its endpoint, as text.
        instance_id: its id.
    """

    endpoint: str
    instance_id: int


served_by: ContextVar[ServedBy | None] = ContextVar("triton_distributed_served_by", default=None)


def current_context() -> Context | None:
    """Return the context of the request whose handler runs here, or None outside of handlers."""
    return current.get()
