"""One request of HTTP and its answer, over ASGI: the body and the answer."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from triton_distributed.llm.http.chunks import PING
from triton_distributed.llm.http.errors import LATER, Refused
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

MAX_HELD_BYTES = 512 * 1024 * 1024
"""About what 1,000 prompts of 20,000 tokens hold."""

_COPIES = 4
"""A body is in memory as its parts, whole, as text and as a prompt. Measured: 4.1 times its bytes."""

_VALUE_BYTES = 130
"""Bytes of an object of Python, for each comma and bracket of a body. Measured: 140 in lists of `{"a":1}`."""

_DENSE = 4096
"""Values are counted in bodies above this number of bytes. It takes 1 ms for each MiB."""


class ClientLeft(Exception):
    """The client has left: there is nothing to answer."""


class Held:
    """The memory of all requests of one server, estimated from their bodies. A request counts until it ends.

    Args:
        limit: the most bytes.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._bytes = 0

    def take(self, facts: Facts, size: int) -> None:
        """Count further bytes of a request.

        Raises:
            Refused: they are too many.
        """
        if self._bytes + size > self._limit:
            if facts.held + size > self._limit:
                text = f"The request needs more than {self._limit:,} bytes of memory."
                raise Refused(413, text, "request_too_large")
            raise Refused(503, "The server holds many large requests. Try again later.", "overloaded", *LATER)
        self._bytes += size
        facts.held += size

    def release(self, facts: Facts) -> None:
        """A request ends."""
        self._bytes -= facts.held
        facts.held = 0


async def read_body(receive: Receive, limit: int, held: Held, facts: Facts) -> bytes:
    """Read the body of a request.

    Args:
        receive: of ASGI.
        limit: the most bytes of the body.
        held: counts the memory.
        facts: of the request.

    Raises:
        ClientLeft: the client left before the end.
        Refused: the body has more than `limit` bytes, or its memory is too much for `held`.
    """
    message = await receive()
    parts: list[bytes] = []
    size = 0
    while message["type"] == "http.request":
        part: bytes = message.get("body", b"")
        size += len(part)
        if size > limit:
            raise Refused(413, f"The body has more than {limit:,} bytes.", "request_too_large")
        held.take(facts, _COPIES * len(part))
        parts.append(part)
        if not message.get("more_body"):
            body = b"".join(parts)  # Without a copy if it is one.
            if size > _DENSE:
                held.take(facts, _VALUE_BYTES * (size - len(body.translate(None, b",[{"))))
            return body
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
    facts.begun = True
    length = (b"content-length", b"%d" % len(body))
    found = [(b"content-type", kind), length, *headers, *facts.headers]
    await send({"type": "http.response.start", "status": status, "headers": found})
    await send({"type": "http.response.body", "body": body})
    facts.status = status


class Heartbeat:
    """Keeps the event streams of one app alive: proxies close a connection that is silent. One timer serves all.

    Args:
        seconds: after this time without an event, and at most twice this time, a comment is sent.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._streams: set[EventStream] = set()
        self._timer: asyncio.TimerHandle | None = None

    def add(self, stream: EventStream) -> None:
        """A stream begins."""
        self._streams.add(stream)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._seconds, self._beat)

    def remove(self, stream: EventStream) -> None:
        """A stream has ended."""
        self._streams.discard(stream)

    def _beat(self) -> None:
        self._timer = None
        for each in self._streams:
            each.beat()
        if self._streams:
            self._timer = asyncio.get_running_loop().call_later(self._seconds, self._beat)


class EventStream:
    """An answer of server-sent events. It begins with the first event, so that an earlier error has its own status.

    Args:
        send: of ASGI.
        facts: of the request.
        heartbeat: of the app.

    Attributes:
        begun: whether it has begun.
    """

    __slots__ = ("_facts", "_heartbeat", "_ping", "_quiet", "_send", "_writing", "begun")

    def __init__(self, send: Send, facts: Facts, heartbeat: Heartbeat) -> None:
        self._send, self._facts, self._heartbeat = send, facts, heartbeat
        self._quiet = self._writing = False
        self._ping: asyncio.Task[None] | None = None
        self.begun = False
        heartbeat.add(self)

    async def write(self, events: bytes, more: bool = True) -> None:
        """Send events; the last ones end the response at once. It waits while the client reads more slowly."""
        self._writing = True
        if self._ping is not None:
            await self._ping
            self._ping = None
        if not self.begun:
            await self._begin()
        await self._send({"type": "http.response.body", "body": events, "more_body": more})
        self._writing = self._quiet = False
        if not more:
            self._facts.status = 200

    async def close(self) -> None:
        """Stop the heartbeat."""
        self._heartbeat.remove(self)
        if self._ping is not None:
            self._ping.cancel()
            await asyncio.gather(self._ping, return_exceptions=True)

    def beat(self) -> None:
        """Send a comment if nothing was sent since the last beat."""
        if self._quiet and not self._writing and (self._ping is None or self._ping.done()):
            self._ping = asyncio.create_task(self._comment(), name="trd-heartbeat")
        self._quiet = True

    async def _begin(self) -> None:
        self.begun = self._facts.begun = True
        headers = [*_STREAM_HEADERS, *self._facts.headers]
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})

    async def _comment(self) -> None:
        if not self.begun:
            await self._begin()
        await self._send({"type": "http.response.body", "body": PING, "more_body": True})
