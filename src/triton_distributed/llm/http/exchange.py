"""One request of the OpenAI API and its answer. How the server is spoken to, subclasses of `Exchange` know."""

from __future__ import annotations

import asyncio

from triton_distributed.llm.http.chunks import PING
from triton_distributed.llm.http.errors import LATER, Refused
from triton_distributed.llm.http.facts import Facts
from triton_distributed.llm.http.head import Head

JSON = b"application/json"

STREAM_HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would collect the chunks otherwise.
)

MAX_HELD_BYTES = 512 * 1024 * 1024
"""About what 1,000 prompts of 20,000 tokens hold."""

COPIES = 4
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

    def take_values(self, facts: Facts, body: bytes) -> None:
        """Count the values of a body of JSON, whose bytes were counted before.

        Raises:
            Refused: they are too many.
        """
        if len(body) > _DENSE:
            self.take(facts, _VALUE_BYTES * (len(body) - len(body.translate(None, b",[{"))))

    def release(self, facts: Facts) -> None:
        """A request ends."""
        self._bytes -= facts.held
        facts.held = 0


class Exchange:
    """A request and its answer: `overasgi.AsgiExchange` in any server of ASGI, and `direct.Direct` in our own.

    Attributes:
        method, path: of the request. The path is that below the place at which the app is mounted.
        head: what its headers say.
        facts: what is known of it.
    """

    __slots__ = ("facts", "head", "method", "path")

    def __init__(self, method: str, path: str, head: Head, facts: Facts) -> None:
        self.method, self.path, self.head, self.facts = method, path, head, facts

    async def body(self, limit: int, held: Held) -> bytes:
        """Read the body of the request.

        Args:
            limit: the most bytes of the body.
            held: counts the memory.

        Raises:
            ClientLeft: the client left before the end.
            Refused: the body has more than `limit` bytes, or its memory is too much for `held`.
        """
        raise NotImplementedError

    async def answer(
        self, status: int, body: bytes, headers: tuple[tuple[bytes, bytes], ...] = (), kind: bytes = JSON
    ) -> None:
        """Send a whole answer with these headers and those of the facts, and note its status."""
        raise NotImplementedError

    async def send(self, events: bytes, more: bool) -> None:
        """Send a part of a stream of events, the first one after the head. It waits while the client reads slowly.

        Args:
            events: the part; it is not empty.
            more: whether another part follows.
        """
        raise NotImplementedError

    def watch(self) -> None:
        """Cancel the task that runs when the client leaves, until `ended` is called."""
        raise NotImplementedError

    def ended(self) -> bool:
        """The request was handled. Return whether its client has left before, which has cancelled the task.

        The cancellation is then taken back.
        """
        raise NotImplementedError


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
        exchange: sends them.
        heartbeat: of the app.
    """

    __slots__ = ("_exchange", "_heartbeat", "_ping", "_quiet", "_writing")

    def __init__(self, exchange: Exchange, heartbeat: Heartbeat) -> None:
        self._exchange, self._heartbeat = exchange, heartbeat
        self._quiet = self._writing = False
        self._ping: asyncio.Task[None] | None = None
        heartbeat.add(self)

    async def write(self, events: bytes, more: bool = True) -> None:
        """Send events; the last ones end the response at once. It waits while the client reads more slowly."""
        self._writing = True
        if self._ping is not None:
            await self._ping
            self._ping = None
        await self._exchange.send(events, more)
        self._writing = self._quiet = False

    async def close(self) -> None:
        """Stop the heartbeat."""
        self._heartbeat.remove(self)
        if self._ping is not None:
            self._ping.cancel()
            await asyncio.gather(self._ping, return_exceptions=True)

    def beat(self) -> None:
        """Send a comment if nothing was sent since the last beat."""
        if self._quiet and not self._writing and (self._ping is None or self._ping.done()):
            self._ping = asyncio.create_task(self._exchange.send(PING, True), name="trd-heartbeat")
        self._quiet = True
