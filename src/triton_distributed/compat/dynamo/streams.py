"""The responses of a call as Dynamo's programs read them: a stop ends the stream, and errors are `ValueError`."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Generator
from typing import Any

from triton_distributed import annotated as native
from triton_distributed.calling.call import Call
from triton_distributed.calling.item_stream import CANCELLED, next_message
from triton_distributed.calling.response_stream import ResponseStream
from triton_distributed.calling.state import ENDED, OPEN
from triton_distributed.compat.dynamo.contexts import Context
from triton_distributed.compat.dynamo.llm.exceptions import translated
from triton_distributed.context import AwaitedRequest

MARK = "_dynamo_annotated"
"""The key that distinguishes a dict with the parts of an `Annotated` from a plain value."""

TELLS = 2
"""Messages that are still read after a stop, and dropped, so that the handler can notice the stop between its items."""


class Annotated(native.Annotated):
    """An item of a response."""

    def comments(self) -> list[str] | None:  # type: ignore[override]
        """The comments; None without comments."""
        return self._comment or None

    def __repr__(self) -> str:
        comment = self._comment or []
        return f"Annotated(data={self._data!r}, event={self._event!r}, comment={comment!r}, id={self._id!r})"


def from_envelope(item: Any) -> Any:
    """An item that a handler has yielded, in the form in which it travels.

    Raises:
        ValueError: the dict is marked as an envelope and has other parts.
    """
    if item.__class__ is not dict or not item.get(MARK):
        return item
    parts = {name: value for name, value in item.items() if name != MARK}
    data, event, comment, id = (parts.pop(name, None) for name in ("data", "event", "comment", "id"))
    if parts:
        raise ValueError(f"an annotated item has data, event, comment and id, not {', '.join(map(repr, parts))}")
    return native.Annotated(data, event, [comment] if isinstance(comment, str) else comment, id)


class _Stop:
    """Tells a stream that its context was stopped, without keeping the stream alive."""

    def __init__(self, stream: AsyncResponseStream) -> None:
        self._stream = weakref.ref(stream)

    def ask_to_stop(self) -> None:
        if (stream := self._stream()) is not None:
            stream.stop()

    cancel = ask_to_stop

    def waits_for(self) -> AwaitedRequest | None:
        return None


class AsyncResponseStream:
    """The responses of one call: iterate over it, also in several loops one after the other.

    `stop_generating()` on the call's context ends the stream and notifies its handler. A stream that the program drops
    after it has read from it cancels the call.

    Raises, from `await` and from iteration:
        ValueError: the handler raised, or no worker takes the request, or the worker was lost; see `exceptions`.
    """

    def __init__(self, native: ResponseStream, annotated: bool, context: Context | None) -> None:
        self._native = native
        self._call: Call = native._call
        self._annotated = annotated
        self._context = context
        self._ended = self._stopped = self._read = self._waiting = False
        self._stop = _Stop(self)
        if context is not None:
            if context.is_stopped():
                self.stop()
            else:
                context.native.attach(self._stop)

    def __await__(self) -> Generator[Any, None, AsyncResponseStream]:
        if not self._stopped:
            try:
                yield from self._native.__await__()
            except Exception as error:
                self._over()
                raise translated(error) from None
        return self

    def __aiter__(self) -> AsyncResponseStream:
        return self

    async def __anext__(self) -> Any:
        self._begin()
        call = self._call
        while not self._ended and not self._stopped:
            for item in call.items:
                if self._annotated:
                    return _checked(item)
                if (data := _checked(item).data()) is not None:
                    return data
            self._waiting = True
            try:
                call.services.check_loop("reading a stream")
                taken = call.take()
                if taken == ENDED:
                    self._over()
                elif not taken:
                    await call.pending()
            except asyncio.CancelledError:
                self._over()
                call.leave(CANCELLED)
                raise
            except Exception as error:
                self._over()
                raise translated(error) from None
            finally:
                self._waiting = False
        if self._stopped:
            self._wind_down()
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """Cancel the call."""
        self._begin()
        self._over()
        self._call.leave("aclose() was called")

    def stop(self) -> None:
        """End the stream because its context was stopped."""
        if self._ended or self._stopped:
            return
        self._stopped = True
        if not self._waiting:
            self._wind_down()
        elif self._call.stream is not None:
            self._call.stream.wake()  # The reader finds that it is stopped.

    def _begin(self) -> None:
        self._read = True
        self._call.reading = True  # What becomes of the call is decided here, and not by the native stream.

    def _over(self) -> None:
        self._ended = True
        if self._context is not None:
            self._context.native.detach(self._stop)

    def _wind_down(self) -> None:
        """Give the handler the chance to hear of the stop, then cancel the call."""
        if not self._ended:
            self._begin()
            self._over()
            self._call.services.core.spawn(_wind_down(self._call))

    def __del__(self) -> None:
        call = self._call
        if not self._ended and self._context is not None:
            self._context.native.detach(self._stop)
        if self._read and not self._ended and call.state <= OPEN:
            call.services.from_finalizer(call.leave)


def _checked(item: Any) -> Annotated:
    """An item of a stream; an error that the handler has yielded is raised.

    Raises:
        ValueError: the item's event is `error`.
    """
    if item.is_error():
        raise ValueError("; ".join(item.comments()) or f"the handler reports an error: {item.data()!r}")
    return Annotated(item.data(), item.event(), item.comments() or None, item.id())


async def _wind_down(call: Call) -> None:
    try:
        for _ in range(TELLS):
            await next_message(call)
    except (Exception, asyncio.CancelledError):
        pass  # The handler has ended, or the runtime closes.
    finally:
        call.leave()
