"""The items of a call: read with `async for` or `anext`, or left, which cancels the handler."""

from __future__ import annotations

import asyncio
from asyncio import _get_running_loop as _running_loop
from operator import length_hint
from time import monotonic
from typing import Generic, Self

from triton_distributed.calling.accepted import accepted
from triton_distributed.calling.call import Call
from triton_distributed.calling.item_type import T_co
from triton_distributed.calling.items import PassedOn
from triton_distributed.calling.state import ENDED, FAILED, OPEN, READ, UNREAD
from triton_distributed.calling.timing import timing_of
from triton_distributed.observe.timing import Timing
from triton_distributed.payload.passing import Batch, Passable

CANCELLED = "its reader was cancelled, for example by a timeout around a single item, which cancels the handler"


class ItemStream(Passable, Generic[T_co]):
    """The items of one call. The call has begun when this object exists.

    Iterate over the stream with `async for` or `anext`, inside `async with` or without it. Leaving the loop or the
    block early, and dropping the stream, read or not, cancels the handler. `await stream.accepted()` waits until a
    handler has the request, so that a refusal raises before the first item is needed.

    Raises, from iteration and from `accepted`:
        NoInstances, InstanceNotFound, ConnectionFailed: no instance can take the request.
        ContractMismatch: the worker serves the endpoint with another contract.
        Overloaded, Draining, Paused: the workers that were tried refused the request.
        InvalidRequest: the request does not fit the contract.
        DeadlineExceeded: the call's time is over.
        StreamIncomplete: the connection was lost after the handler had begun.
        WrongLoop: the stream is used on another event loop than that of its call.

    Raises, from iteration only:
        RemoteError: the handler raised; the error is also an instance of the type that was raised.
        DecodeError: an item does not fit the contract.
        StreamClosed: the stream was left or closed before.
    """

    __slots__ = ("__weakref__", "_call")

    def __init__(self, call: Call) -> None:
        self._call = call

    async def accepted(self) -> None:
        """Wait until a handler has begun with the request, e.g. before an HTTP response gets its status.

        All errors that come before that are raised here, after other instances were tried. An error of the handler
        itself is raised by iteration. A stream that has an item, or its end, has been accepted. If the wait is
        cancelled, so is the call.

        Raises:
            Overloaded, Draining, Paused: the workers that were tried refused the request.
            InvalidRequest: the request does not fit the handler. An invalid item of a stream of requests is found
                later, when the handler reads it.
            NoInstances, InstanceNotFound, ConnectionFailed, MessageTooLarge: no instance can take the request.
            DeadlineExceeded: the call's time is over, perhaps while the request waited for a place.
            StreamIncomplete: the connection was lost, and it is unknown whether the handler has begun.
            StreamClosed: the stream was left or closed before, or has raised its error.
            RuntimeError: another task reads the stream, or waits for its acceptance.
            WrongLoop: the stream belongs to another event loop.
        """
        await accepted(self._call)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._call.services.check_loop("async with")
        self._call.leave("its `async with` was left, which cancels the handler")

    def __aiter__(self) -> Reading[T_co]:
        call = self._call
        if _running_loop() is not call.services.loop:
            call.services.check_loop("reading a stream")
        if call.state >= READ:
            self.check_unread()
        return Reading(call, True)

    async def __anext__(self) -> T_co:
        call = self._call
        while True:
            for item in call.items:
                return item  # type: ignore[no-any-return]
            await next_message(call)

    def check_unread(self) -> None:
        """Check that an `async for` may begin. On a stream whose end is known it would look like an empty answer."""
        call = self._call
        if call.state == FAILED:
            raise call.stream_closed_error()
        if call.state == READ:
            raise RuntimeError(
                f"the stream from {call.services.target} was already read to its end ({call.received} items), and a "
                "stream can be read only once: keep the items, or call again"
            )

    def __del__(self) -> None:
        call = self._call
        if call.state <= OPEN and not call.reading:
            call.services.from_finalizer(call.leave)

    def cancel(self) -> bool:
        """Cancel the handler. False if the call was already over."""
        under_way = self._call.state <= OPEN
        self._call.cancel()
        return under_way

    async def aclose(self) -> None:
        """Cancel the handler, as leaving the loop does. Reading afterwards raises `StreamClosed`.

        Raises:
            RuntimeError: another task waits for the next item; `cancel()` ends that task's read, too.
            WrongLoop: the stream belongs to another event loop.
        """
        self._call.services.check_loop("aclose")
        if self._call.awaited:
            raise RuntimeError(
                "aclose(): another task is reading this stream, and only one may read at a time: cancel() ends both"
            )
        self._call.leave("aclose() was called")

    def pass_on(self, batch: Batch) -> None:
        self._pass_on(batch, keeps_none=True)

    def _pass_on(self, batch: Batch, keeps_none: bool) -> None:
        call = self._call
        # A contract's types are checked at each hop, and a call that can be resumed counts its items.
        if call.decoder is None and call.resumption is None and not call.annotated:
            call.decoder = PassedOn(batch, keeps_none)

    @property
    def instance_id(self) -> int | None:
        """The id of the instance that has the request; None before the request was sent."""
        return self._call.instance.id if self._call.instance is not None else None

    def timing(self) -> Timing:
        """Where the time of this call went, so far or in all; see `Timing`."""
        return timing_of(self._call, monotonic())

    @property
    def ready(self) -> bool:
        """Whether an item, or the end after the last one, has arrived that is not read yet."""
        call = self._call
        stream = call.stream
        return length_hint(call.items) > 0 or (stream is not None and len(stream.inbox) > 0)

    @property
    def admitted(self) -> bool:
        """Whether the worker has announced a handler for the request: it waits in no queue any more."""
        stream = self._call.stream
        return stream is not None and stream.accepted

    @property
    def ended(self) -> bool:
        """Whether nothing more comes from the worker. Items that have arrived may wait for the reader."""
        return self._call.state > OPEN

    @property
    def request_id(self) -> str:
        """The request's id, as the handler sees it; empty before the request was sent."""
        return self._call.request_id

    def __repr__(self) -> str:
        call = self._call
        state = "over" if call.state > OPEN else "open" if call.stream is not None else "being sent"
        return f"<{type(self).__name__} {state}, {call.received} items received>"


class Reading(Generic[T_co]):
    """One `async for` over a stream. When the loop is left, this object is dropped, and the handler is cancelled."""

    __slots__ = ("_call", "_guest", "_keeps_none")

    def __init__(self, call: Call, keeps_none: bool) -> None:
        self._call = call
        self._keeps_none = keeps_none  # None is a value, and not an item without data.
        self._guest = False  # Another task was reading the call before, and keeps it.
        call.reading = True

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> T_co:
        call = self._call
        while True:
            for item in call.items:
                if item is not None or self._keeps_none:
                    return item  # type: ignore[no-any-return]
            # As `next_message(call)`, but without another coroutine for each message.
            taken = call.take()
            if taken == ENDED:
                raise StopAsyncIteration
            if not taken:
                try:
                    await call.pending()
                except asyncio.CancelledError:
                    call.leave(CANCELLED)
                    raise
                except RuntimeError:
                    self._guest = True
                    raise

    def __del__(self) -> None:
        call = self._call
        if call.state <= UNREAD and not self._guest:
            call.services.from_finalizer(call.leave)


async def next_message(call: Call) -> None:
    """Wait for the next message and make its items the current ones.

    Raises:
        StopAsyncIteration: there are no more items.
        Exception: as `Call.take` raises it.
    """
    call.services.check_loop("reading a stream")
    while not (taken := call.take()):
        try:
            await call.pending()
        except asyncio.CancelledError:
            call.leave(CANCELLED)
            raise
    if taken == ENDED:
        raise StopAsyncIteration
