"""One request of HTTP and its answer, over ASGI: the body and the answer."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from triton_distributed.llm.http.chunks import PING
from triton_distributed.llm.http.errors import Refused
from triton_distributed.llm.http.facts import Facts

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

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


async def answer(
    send: Send,
    facts: Facts,
    status: int,
    body: bytes,
    headers: tuple[tuple[bytes, bytes], ...] = (),
    kind: bytes = b"application/json",
) -> None:
    """Send a whole answer, and note its status."""
    length = (b"content-length", b"%d" % len(body))
    found = [(b"content-type", kind), length, *headers, *facts.headers]
    await send({"type": "http.response.start", "status": status, "headers": found})
    await send({"type": "http.response.body", "body": body})
    facts.status = status


class EventStream:
    """An answer of server-sent events. It begins with the first event, so that an earlier error has its own status.

    Args:
        send: of ASGI.
        facts: of the request.
        heartbeat_s: after this many seconds without an event, a comment is sent, so that proxies keep the connection.

    Attributes:
        begun: whether it has begun.
    """

    def __init__(self, send: Send, facts: Facts, heartbeat_s: float) -> None:
        self._send, self._facts = send, facts
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
            headers = [*_STREAM_HEADERS, *self._facts.headers]
            await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        await self._send({"type": "http.response.body", "body": events, "more_body": more})
        if not more:
            self._facts.status = 200

    def _beat(self) -> None:
        if self._quiet and not self._writing and (self._ping is None or self._ping.done()):
            self._ping = self._loop.create_task(self._write(PING, True), name="trd-heartbeat")
        self._quiet = True
        self._timer = self._loop.call_later(self._heartbeat_s, self._beat)
