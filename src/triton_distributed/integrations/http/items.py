"""Responses that stream the items of a call: server-sent events, or lines of JSON."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterable, Callable
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from triton_distributed.calling.item_stream import ItemStream
from triton_distributed.context import current
from triton_distributed.integrations.http.errors import ending, reported
from triton_distributed.integrations.http.text import Event, to_event, to_line

T = TypeVar("T")

BUFFER_BYTES = 64 * 1024
"""The most that is read ahead of a client that reads slowly, plus one item. As much as uvicorn buffers."""

HEARTBEAT_S = 15.0
"""The interval that the specification of server-sent events suggests for comments, below the 60 s of most proxies."""


async def sse(
    items: ItemStream[T] | AsyncIterable[T],
    *,
    event: Callable[[T], object] | None = None,
    last: object = None,
    heartbeat_s: float | None = HEARTBEAT_S,
) -> Response:
    """Answer with server-sent events, one for each item. It waits until a handler has accepted the request.

    So a refusal raises here and becomes a response with its own status. An error after that ends the stream with an
    event `error`, whose data is the body of an error response. The handler is cancelled if the client leaves.

    Args:
        items: the stream of a call; or an async iterator, which is not waited for.
        event: makes an `Event`, or the data of one, from an item. By default the item is the data: text as it is, any
            other value as JSON.
        last: an `Event`, or the data of one, to send after the last item of a complete stream.
        heartbeat_s: seconds without an item after which a comment is sent, so that proxies keep the connection; None
            for no comments.

    Raises:
        ValueError: heartbeat_s is not above 0.
        TritonError: no handler accepted the request; see `ItemStream.accepted`.
    """
    if heartbeat_s is not None and not heartbeat_s > 0:
        raise ValueError(f"heartbeat_s={heartbeat_s!r}: must be a number of seconds above 0, or None")
    end = b"" if last is None else to_event(last)

    def encode(item: T) -> bytes:
        return to_event(item if event is None else event(item))

    def failure(body: dict[str, Any]) -> bytes:
        return to_event(Event(body, "error"))

    await _accepted(items)
    return ItemsResponse(items, "text/event-stream", encode, failure, end, heartbeat_s)


async def ndjson(items: ItemStream[T] | AsyncIterable[T]) -> Response:
    """Answer with one line of JSON for each item. It waits until a handler has accepted the request; see `sse`.

    An error after that ends the stream with a line `{"error": …}`, which holds the body of an error response.

    Args:
        items: the stream of a call; or an async iterator, which is not waited for.

    Raises:
        TritonError: no handler accepted the request; see `ItemStream.accepted`.
    """

    def failure(body: dict[str, Any]) -> bytes:
        return to_line({"error": body})

    await _accepted(items)
    return ItemsResponse(items, "application/x-ndjson", to_line, failure, b"", None)


async def _accepted(items: object) -> None:
    if isinstance(items, ItemStream):
        await items.accepted()


class ItemsResponse(Response):
    """A response whose body is made from items while they arrive. Items that are there already leave together.

    A task reads the items into a buffer, and the request's own task sends what is in it. If the client reads slowly,
    the buffer fills, the reader waits, and with it the handler.

    Args:
        items: the items.
        media_type: the content type.
        encode: makes the bytes of an item.
        failure: makes the bytes that tell the client of an error.
        end: the bytes after the last item.
        heartbeat_s: seconds without an item after which a comment is sent; None for no comments.
    """

    def __init__(
        self,
        items: AsyncIterable[Any],
        media_type: str,
        encode: Callable[[Any], bytes],
        failure: Callable[[dict[str, Any]], bytes],
        end: bytes,
        heartbeat_s: float | None,
    ) -> None:
        self.status_code = 200
        self.media_type = media_type
        self.background = None
        # `no-cache` is for caches, and the other one keeps nginx from collecting the events.
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no"})
        self._items = items
        self._encode, self._failure, self._end = encode, failure, end
        self._heartbeat_s = heartbeat_s
        self._parts: list[bytes] = []
        self._size = 0
        self._over = False
        self._waiter: asyncio.Future[None] | None = None  # The sender waits for parts, or the reader for space.

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        reader = asyncio.create_task(self._read())
        more = False
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            more = True
            while more:
                if not self._parts and not self._over:
                    await self._woken(self._heartbeat_s)
                body, more = b"".join(self._parts), not self._over
                self._parts.clear()
                self._size = 0
                self._wake()
                await send({"type": "http.response.body", "body": body, "more_body": more})
        except OSError:  # The client has left. Other servers than uvicorn report it so.
            return
        except asyncio.CancelledError:  # The server ends. What was sent must not look complete.
            if more:
                rest = b"".join([*self._parts, self._failure(ending().body())])
                with contextlib.suppress(OSError):
                    await send({"type": "http.response.body", "body": rest, "more_body": False})
            raise
        finally:
            reader.cancel()
            await asyncio.wait([reader])
            await self._leave()
        if self.background is not None:
            await self.background()

    async def _read(self) -> None:
        try:
            async for item in self._items:
                self._put(self._encode(item))
                while self._size >= BUFFER_BYTES:
                    await self._woken(None)
            self._put(self._end)
        except asyncio.CancelledError as error:
            task, context = asyncio.current_task(), current.get()
            if (task is not None and task.cancelling()) or (context is not None and context.is_killed()):
                raise  # The sender has ended, or the client has left.
            self._put(self._failure(reported(error).body()))  # The app has cancelled it. It must not look complete.
        except Exception as error:
            self._put(self._failure(reported(error).body()))
        finally:
            self._over = True
            self._wake()

    async def _leave(self) -> None:
        items = self._items
        if isinstance(items, ItemStream):
            items.cancel()
        elif (close := getattr(items, "aclose", None)) is not None:
            await close()

    def _put(self, part: bytes) -> None:
        self._parts.append(part)
        self._size += len(part)
        self._wake()

    async def _woken(self, heartbeat_s: float | None) -> None:
        """Wait until the other task has done something, or until it is time for a comment."""
        loop = asyncio.get_running_loop()
        self._waiter = loop.create_future()
        timer = None if heartbeat_s is None else loop.call_later(heartbeat_s, self._put, b":\n\n")
        try:
            await self._waiter
        finally:
            if timer is not None:
                timer.cancel()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
