"""The result of a call, which a caller may await, iterate over, or ignore."""

from __future__ import annotations

import asyncio
import logging
from asyncio import _get_running_loop as _running_loop
from collections.abc import Callable, Generator
from functools import partial
from typing import Any, Self

from triton_distributed.calling.call import Call
from triton_distributed.calling.item_stream import ItemStream, Reading, next_message
from triton_distributed.calling.item_type import T_co
from triton_distributed.calling.state import OPEN, READ, UNREAD
from triton_distributed.errors import TritonError
from triton_distributed.payload.passing import Batch

logger = logging.getLogger("triton_distributed.runtime")


class ResponseStream(ItemStream[T_co]):
    """The responses of one call. The call has begun when this object exists.

    Iterate over the stream with `async for` or `anext`. If you do neither, the request runs all the same, and its
    answer is dropped. `await` returns the stream itself when the request was sent. It does not wait for the worker,
    which may still refuse the request: `await stream.accepted()` does.

    Leaving an `async for` or an `async with` early, by `break`, an exception or cancellation, cancels the handler. So
    does `cancel()`, and so does dropping a stream after `accepted()` or `anext`. A stream can be read once. After it
    was left or closed, reading raises `StreamClosed`; the stream never looks complete.

    Raises, from `await` and from iteration:
        NoInstances, InstanceNotFound, ConnectionFailed: no instance can take the request.
        DeadlineExceeded: the call's time is over.
        MessageTooLarge: the request is above a limit.
        WrongLoop: the stream is used on another event loop than that of its call.

    Raises, from iteration, and partly from `accepted()`, see there:
        Overloaded, Draining, Paused: the workers that were tried refused the request; no handler began. (`await` raises
            this only if the worker's answer has arrived by then.)
        InvalidRequest: the request does not fit the handler.
        RemoteError: the handler raised; the error is also an instance of the type that was raised.
        StreamIncomplete: the connection was lost after the handler had begun.
        StreamClosed: the stream was left or closed before; or an `async for` begins after the stream raised its error.
        RuntimeError: another task waits for the next item of this stream, or an `async for` has read it to its end
            before.
    """

    __slots__ = ("_callbacks", "_read")

    def __init__(self, call: Call) -> None:
        self._call = call
        self._read = False
        self._callbacks: list[tuple[Callable[[Any], object], Callable[[object], None]]] | None = None

    def __await__(self) -> Generator[Any, None, Self]:
        call = self._call
        while (pending := call.sending) is not None and not pending.done():
            call.services.check_loop("await")
            try:
                yield from asyncio.shield(pending).__await__()
            except asyncio.CancelledError:
                call.cancel()
                raise
        if (refusal := _refusal(call)) is not None:
            self._read = True
            if isinstance(refusal, TritonError):
                call.error = type(refusal)(*refusal.args)  # Later reads raise an equal error.
            try:
                raise refusal
            finally:
                del refusal
        return self

    def pass_on(self, batch: Batch) -> None:
        self._pass_on(batch, keeps_none=False)

    async def accepted(self) -> None:
        self._read = True
        await super().accepted()

    async def __aenter__(self) -> Self:
        self._read = True
        return self

    def __aiter__(self) -> Reading[T_co]:
        call = self._call
        if _running_loop() is not call.services.loop:
            call.services.check_loop("reading a stream")
        if call.state >= READ:
            self.check_unread()
        return Reading(call, False)

    async def __anext__(self) -> T_co:
        self._read = True
        call = self._call
        while True:
            for item in call.items:
                if item is not None:  # None is an item without data. Annotated items are never None.
                    return item  # type: ignore[no-any-return]
            await next_message(call)

    def __del__(self) -> None:
        call = self._call
        if call.state <= OPEN and not call.reading:
            call.services.from_finalizer(call.leave if self._read else partial(_dropped, call))

    # The interface of a future.

    def done(self) -> bool:
        """Whether awaiting returns at once: the request was sent, or cannot be."""
        pending = self._call.sending
        return pending is None or pending.done()

    def cancelled(self) -> bool:
        """Whether the call was cancelled before the request was sent."""
        return self._call.stream is None and self._call.state > UNREAD

    def result(self) -> Self:
        """Return the stream itself, or raise the error that `await` would raise.

        Raises:
            asyncio.InvalidStateError: the request is still on its way.
        """
        if not self.done():
            raise asyncio.InvalidStateError("the request was not sent yet")
        if (refusal := _refusal(self._call)) is not None:
            raise refusal
        return self

    def exception(self) -> BaseException | None:
        """The error that prevented the request from being sent, or None.

        Raises:
            asyncio.InvalidStateError: the request is still on its way.
        """
        if not self.done():
            raise asyncio.InvalidStateError("the request was not sent yet")
        return _refusal(self._call)

    def add_done_callback(self, callback: Callable[[Self], object], *, context: Any = None) -> None:
        """Call `callback` with this stream, in a later turn of the loop, once the request was sent or cannot be."""
        loop = asyncio.get_running_loop()
        pending = self._call.sending
        if pending is None or pending.done():
            loop.call_soon(callback, self, context=context)
            return

        def done(_: object) -> None:
            callback(self)

        self._callbacks = [*(self._callbacks or ()), (callback, done)]
        pending.add_done_callback(done, context=context)

    def remove_done_callback(self, callback: Callable[[Self], object]) -> int:
        """Remove a callback that `add_done_callback` added. Returns how often it was registered."""
        pending = self._call.sending
        found = [done for known, done in self._callbacks or () if known == callback]
        self._callbacks = [each for each in self._callbacks or () if each[0] != callback]
        return sum(pending.remove_done_callback(each) for each in found) if pending is not None else 0


def _refusal(call: Call) -> BaseException | None:
    """The error if the request could not be sent to any instance."""
    return call.error if call.state > OPEN and call.stream is None else None


def _dropped(call: Call) -> None:
    discard(call)


def discard(call: Call) -> asyncio.Task[None]:
    """Let the request run and drop its answer, because the stream was dropped before it was read.

    Returns:
        a task that ends with the request.
    """
    return call.services.core.spawn(_read_all(call))


async def _read_all(call: Call) -> None:
    try:
        while True:
            await next_message(call)
    except (StopAsyncIteration, asyncio.CancelledError):
        pass
    except Exception as error:  # A handler's error arrives with its own type.
        path = call.services.candidates.name.path
        logger.info('a call to "%s" failed, and its answer was not read: %s', path, error)
