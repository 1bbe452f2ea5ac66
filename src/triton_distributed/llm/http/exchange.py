"""One request of HTTP and its answer, over ASGI: the body, the answer, and the client that leaves."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from triton_distributed.llm.http.chunks import PING
from triton_distributed.llm.http.errors import Refused

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

_JSON = (b"content-type", b"application/json")
_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would collect the chunks otherwise.
]


class ClientLeft(Exception):
    """The client has left: there is nothing to answer."""


async def read_body(receive: Receive, limit: int) -> bytes:
    """Read the body of a request.

    Raises:
        ClientLeft: the client left before the end.
        Refused: the body has more than `limit` bytes.
    """
    message = await receive()
    if message["type"] == "http.request" and not message.get("more_body"):
        body: bytes = message.get("body", b"")
        if len(body) <= limit:
            return body
    parts: list[bytes] = []
    size = 0
    while message["type"] == "http.request":
        part = message.get("body", b"")
        parts.append(part)
        size += len(part)
        if size > limit:
            raise Refused(413, f"The body has more than {limit:,} bytes.", "request_too_large")
        if not message.get("more_body"):
            return b"".join(parts)
        message = await receive()
    raise ClientLeft


class Presence:
    """Cancels the task of a request when its client leaves.

    `async with Presence(receive)` turns this cancellation into `ClientLeft`, and lets those of others through.
    """

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._left = False
        self._task: asyncio.Task[Any] | None = None
        self._watcher: asyncio.Task[None] | None = None

    async def __aenter__(self) -> None:
        self._task = asyncio.current_task()
        self._watcher = asyncio.create_task(self._watch(), name="trd-client-presence")

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        watcher, task = self._watcher, self._task
        assert watcher is not None
        assert task is not None
        watcher.cancel()
        if not self._left:
            return
        if not isinstance(error, asyncio.CancelledError):  # The cancellation has not arrived yet: take it here.
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(0)
        if task.uncancel() == 0:
            raise ClientLeft from None

    async def _watch(self) -> None:
        with contextlib.suppress(Exception):  # A server that cannot tell has lost the client.
            while (await self._receive())["type"] != "http.disconnect":
                pass
        self._left = True
        assert self._task is not None
        self._task.cancel("the client has left")


async def answer(send: Send, status: int, body: bytes, headers: tuple[tuple[bytes, bytes], ...] = ()) -> None:
    """Send a whole answer of JSON."""
    length = (b"content-length", b"%d" % len(body))
    await send({"type": "http.response.start", "status": status, "headers": [_JSON, length, *headers]})
    await send({"type": "http.response.body", "body": body})


class EventStream:
    """An answer of server-sent events. It begins with the first event, so that an earlier error has its own status.

    Args:
        send: of ASGI.
        heartbeat_s: after this many seconds without an event, a comment is sent, so that proxies keep the connection.

    Attributes:
        begun: whether it has begun.
    """

    def __init__(self, send: Send, heartbeat_s: float) -> None:
        self._send = send
        self._heartbeat_s = heartbeat_s
        self._quiet = self._writing = False
        self._ping: asyncio.Task[None] | None = None
        self._loop = asyncio.get_running_loop()
        self._timer = self._loop.call_later(heartbeat_s, self._beat)
        self.begun = False

    async def write(self, events: bytes, more: bool = True) -> None:
        """Send events; the last ones end the response at once. It waits while the client reads more slowly."""
        self._writing = True
        if self._ping is not None:
            await self._ping
            self._ping = None
        await self._write(events, more)
        self._writing = self._quiet = False

    async def close(self) -> None:
        """Stop the heartbeat."""
        self._timer.cancel()
        if self._ping is not None:
            self._ping.cancel()
            await asyncio.gather(self._ping, return_exceptions=True)

    async def _write(self, events: bytes, more: bool) -> None:
        if not self.begun:
            self.begun = True
            await self._send({"type": "http.response.start", "status": 200, "headers": _STREAM_HEADERS})
        await self._send({"type": "http.response.body", "body": events, "more_body": more})

    def _beat(self) -> None:
        if self._quiet and not self._writing and (self._ping is None or self._ping.done()):
            self._ping = self._loop.create_task(self._write(PING, True), name="trd-heartbeat")
        self._quiet = True
        self._timer = self._loop.call_later(self._heartbeat_s, self._beat)
