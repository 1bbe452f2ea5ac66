"""What a handler knows about the request it serves, and what a caller steers a call with."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

from triton_distributed.names import EndpointName

__all__: list[str] = []  # Programs import these names from `triton_distributed.runtime`.


# Names of what travels with a request's metadata; a user's own cannot begin with a NUL.
ID, PRIORITY, RESUME = "\0id", "\0p", "\0r"
LOWEST_PRIORITY, HIGHEST_PRIORITY = -128, 127
CLEANUP_S = 30.0
"""Seconds that the calls of a handler's clean-up have, counted from the cancellation of the handler.

As long as a drain by default (`TRD_DRAIN_TIMEOUT_S`): time to give back a slot, a lock or a cache block elsewhere."""


class AwaitedRequest(NamedTuple):
    """A request whose answer is awaited.

    Attributes:
        endpoint: that was called.
        instance_id: of the worker that has the request or is about to get it.
        sent: the nonce of its session and its stream's id, if it was sent.
    """

    endpoint: EndpointName
    instance_id: int
    sent: tuple[int, int] | None


class AttachedCall(Protocol):
    """A call made on behalf of a context."""

    def cancel(self) -> None: ...

    def ask_to_stop(self) -> None: ...

    def awaits(self) -> AwaitedRequest | None:
        """What it waits for; None before an instance was chosen."""


class Context:
    """The request being served, or a handle that the caller passes to `generate(…, context=)`.

    Args:
        id: names the request in logs and errors; made up when not given.
        metadata: plain values that travel with the request.

    A handler gets one as its second parameter. Calls that a handler makes inherit what is left of its deadline and are
    cancelled with it by themselves; passing the context on also passes its id and metadata. The calls that a handler's
    clean-up makes after such a cancellation run: see `CLEANUP_S`.

    Raises:
        TypeError: the id is not text, or the metadata is not a mapping.
    """

    # Defaults stand on the class: one is made for every request, and few requests change any of them.
    metadata: Mapping[str, Any] = MappingProxyType({})
    deadline: float | None = None  # of the request, on the event loop's clock, seconds
    calls_deadline: float | None = None  # of the calls that the handler makes: `deadline`, or later during clean-up
    priority: int = 0  # of the call: those with a larger one are let in first where requests wait
    over = False  # the request was answered: what its handler has left running no longer acts for it
    resume_token: Any = None  # where to go on behind, given by an earlier instance's `checkpoint`; None from the start
    _id: str | None = None
    _pending_token: bytes | None = None
    _stopped = False
    _killed = False
    _waiters: list[asyncio.Future[None]] | None = None
    _calls: dict[AttachedCall, None] | None = None  # in order; bounded by the calls that are open

    def __init__(self, id: str | None = None, metadata: Mapping[str, Any] | None = None) -> None:
        if id is not None:
            if not isinstance(id, str):
                raise TypeError(f"id={id!r}: the id of a context is a str")
            self._id = id
        if metadata is not None:
            self.metadata = read_only(metadata)

    def id(self) -> str:
        """The request's id."""
        if self._id is None:
            self._id = os.urandom(16).hex()
        return self._id

    def remaining_s(self) -> float | None:
        """Seconds until the deadline, not below 0, or None where there is none."""
        if self.deadline is None:
            return None
        return max(0.0, self.deadline - self.now())

    def now(self) -> float:
        """Seconds on the clock of `deadline`; asked in any thread."""
        return asyncio.get_running_loop().time()

    def checkpoint(self, token: Any) -> None:
        """Attach a resume token to the next item: a call with `resume=True` that loses this instance behind that item
        goes on with another, whose `resume_token` it is. Without a request being served, nothing happens.

        Args:
            token: any plain value that says where the stream goes on behind the next item, up to 64 KiB encoded.

        Raises:
            TypeError: it holds something that cannot travel.
            ValueError: it is too large.
        """

    def take_token(self) -> bytes | None:
        """The token that `checkpoint` was given in a thread since the last item."""
        token = self._pending_token
        if token is not None:
            self._pending_token = None
        return token

    def attach_token(self, token: bytes) -> None:
        """On the loop's thread: the next item carries this encoded token."""

    def is_stopped(self) -> bool:
        """Whether the handler should finish by itself: the caller asked, or is gone."""
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
        """`call` is made on behalf of this context."""
        if self._calls is None:
            self._calls = {}
        self._calls[call] = None
        if self._killed:
            call.cancel()
        elif self._stopped:
            call.ask_to_stop()

    def detach(self, call: AttachedCall) -> None:
        """`call` is over."""
        if self._calls is not None:
            self._calls.pop(call, None)

    def __repr__(self) -> str:
        state = "killed" if self._killed else "stopped" if self._stopped else "running"
        return f"<Context {self._id or 'unnamed'} {state}>"


def read_only(metadata: object) -> Mapping[str, Any]:
    """A read-only copy of a request's metadata.

    Raises:
        TypeError: it is not a mapping.
    """
    if not isinstance(metadata, Mapping):
        raise TypeError(f"metadata={metadata!r}: a mapping of plain values by name")
    return MappingProxyType(dict(metadata))


def awaited_requests(context: Context) -> list[AwaitedRequest]:
    """What the open calls that were made on behalf of a context wait for."""
    return [awaited for call in context._calls or () if (awaited := call.awaits()) is not None]


current: ContextVar[Context | None] = ContextVar("triton_distributed_context", default=None)


def current_context() -> Context | None:
    """The context of the request whose handler is running here, or None outside of handlers."""
    return current.get()
