"""The yardstick: a multiplexed call on one event loop without a single feature.

Each call is one request and a stream of items. Many calls share one connection. A message has a 9-byte head and a
msgpack body, and each request has one task. The output of a loop turn is one write, and the items of one stream in it
are one frame. There is no discovery, routing, error, cancellation, flow control, limit, deadline or metric: the
difference to the yardstick is the cost of these.
"""

from __future__ import annotations

import asyncio
import struct
import sys
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.handlers import Call, Handler
from benchmarks.peers.codec import decode, encode

HEAD = struct.Struct("<BII")  # Fields: the kind, the stream, the bytes of the body.
CALL, ONE, ONE_AND_END, MANY, END = range(5)
TASK_OPTIONS: dict[str, Any] = {"eager_start": True} if sys.version_info >= (3, 12) else {}


def join_items(items: list[bytes]) -> bytes:
    """Return a msgpack array of values that are already encoded."""
    count = len(items)
    if count < 16:
        start = bytes([0x90 + count])
    elif count < 1 << 16:
        start = struct.pack(">BH", 0xDC, count)
    else:
        start = struct.pack(">BI", 0xDD, count)
    return start + b"".join(items)


class Connection(asyncio.Protocol):
    """The common part of both ends: cutting bytes into frames, and one write for each loop turn."""

    transport: asyncio.Transport

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.outgoing: list[bytes] = []
        self.will_write = False
        self.parts: list[bytes] = []
        self.missing = 0

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def put(self, what: int, number: int, body: bytes = b"") -> None:
        self.outgoing += (HEAD.pack(what, number, len(body)), body)

    def write_soon(self) -> None:
        if not self.will_write:
            self.will_write = True
            self.loop.call_soon(self.write_now)

    def write_now(self) -> None:
        self.will_write = False
        self.collect()
        self.transport.write(b"".join(self.outgoing))
        self.outgoing.clear()

    def collect(self) -> None:
        """Put the frames of all data that waits to be written."""

    def data_received(self, data: bytes) -> None:
        # A large body arrives in many pieces. They are joined once, when the last piece has arrived.
        if self.missing:
            self.parts.append(data)
            self.missing -= len(data)
            if self.missing > 0:
                return
            data = b"".join(self.parts)
            self.parts.clear()
            self.missing = 0
        position, end = 0, len(data)
        while position < end:
            body = position + HEAD.size
            if body > end:
                self.missing = body - end
                break
            what, number, size = HEAD.unpack_from(data, position)
            if body + size > end:
                self.missing = body + size - end
                break
            position = body + size
            self.received(what, number, data[body:position])
        if self.missing:
            self.parts.append(data[position:])

    def received(self, what: int, number: int, body: bytes) -> None:
        raise NotImplementedError


class Answer:
    """The serving end of one stream."""

    __slots__ = ("ended", "items", "listed", "number")

    def __init__(self, number: int) -> None:
        self.number = number
        self.items: list[bytes] = []
        self.ended = self.listed = False


class Serving(Connection):
    """The worker's end of a connection."""

    def __init__(self, handler: Handler) -> None:
        super().__init__()
        self.handler = handler
        self.tasks: set[asyncio.Task[None]] = set()
        self.waiting: list[Answer] = []

    def received(self, what: int, number: int, body: bytes) -> None:
        task = asyncio.Task(self.run(Answer(number), decode(body)), loop=self.loop, **TASK_OPTIONS)
        if not task.done():
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)

    async def run(self, answer: Answer, request: Any) -> None:
        async for item in self.handler(request):
            answer.items.append(encode(item))
            if not answer.listed:
                self.enlist(answer)
        answer.ended = True
        if not answer.listed:
            self.enlist(answer)

    def enlist(self, answer: Answer) -> None:
        answer.listed = True
        self.waiting.append(answer)
        self.write_soon()

    def collect(self) -> None:
        for answer in self.waiting:
            answer.listed = False
            if len(answer.items) == 1:
                self.put(ONE_AND_END if answer.ended else ONE, answer.number, answer.items[0])
            else:
                if answer.items:
                    self.put(MANY, answer.number, join_items(answer.items))
                if answer.ended:
                    self.put(END, answer.number)
            answer.items.clear()
        self.waiting.clear()

    def connection_lost(self, error: Exception | None) -> None:
        for task in self.tasks:
            task.cancel()


class Items:
    """The calling end of one stream."""

    __slots__ = ("connection", "ended", "items", "waiter")

    def __init__(self, connection: Calling) -> None:
        self.connection = connection
        self.items: deque[Any] = deque()
        self.ended = False
        self.waiter: asyncio.Future[None] | None = None

    def __aiter__(self) -> Items:
        return self

    async def __anext__(self) -> Any:
        if not self.items:
            if not self.ended:
                self.waiter = self.connection.loop.create_future()
                await self.waiter
            if not self.items:
                raise StopAsyncIteration
        return self.items.popleft()

    def wake(self) -> None:
        waiter, self.waiter = self.waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)


class Calling(Connection):
    """The client's end of a connection."""

    def __init__(self) -> None:
        super().__init__()
        self.streams: dict[int, Items] = {}
        self.calls = 0

    def generate(self, request: Any) -> Items:
        self.calls += 1
        stream = self.streams[self.calls] = Items(self)
        self.put(CALL, self.calls, encode(request))
        self.write_soon()
        return stream

    def received(self, what: int, number: int, body: bytes) -> None:
        stream = self.streams[number]
        if what == MANY:
            stream.items.extend(decode(body))
        elif what != END:
            stream.items.append(decode(body))
        if what in (ONE_AND_END, END):
            stream.ended = True
            del self.streams[number]
        stream.wake()


class Yardstick:
    """One listening socket for each handler, so that no frame needs to name its handler."""

    def __init__(self, directory: Path, tcp: bool) -> None:
        self.directory, self.tcp = directory, tcp
        self.servers: list[asyncio.Server] = []

    async def serve(self, service: str, handlers: dict[str, Handler]) -> None:
        loop = asyncio.get_running_loop()
        for name, handler in handlers.items():
            path = self.directory / f"{service}.{name}"
            factory = self._factory(handler)
            if self.tcp:
                server = await loop.create_server(factory, "127.0.0.1", 0)
                path.write_text(str(server.sockets[0].getsockname()[1]))
            else:
                server = await loop.create_unix_server(factory, str(path))
            self.servers.append(server)

    @staticmethod
    def _factory(handler: Handler) -> Callable[[], Serving]:
        return lambda: Serving(handler)

    async def connect(self, service: str, handler: str) -> Call:
        loop = asyncio.get_running_loop()
        path = self.directory / f"{service}.{handler}"
        if self.tcp:
            _, connection = await loop.create_connection(Calling, "127.0.0.1", int(path.read_text()))
        else:
            _, connection = await loop.create_unix_connection(Calling, str(path))
        return connection.generate


make = Yardstick
