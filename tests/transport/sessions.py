"""Sessions without a runtime: a service that does as its requests say, callers, and peers that behave as they like."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest

from tests.timing import PATIENCE_S
from triton_distributed.transport.address import Address
from triton_distributed.transport.inbound import Inbound
from triton_distributed.transport.listener import Listener
from triton_distributed.transport.network import Networks
from triton_distributed.transport.pool import SessionPool
from triton_distributed.transport.session import Session
from triton_distributed.transport.shared_pool import SharedPool
from triton_distributed.transport.stream import Owner, Stream
from triton_distributed.transport.tls import SessionTls
from triton_distributed.wire import frames as f
from triton_distributed.wire.authentication import CHALLENGE_BYTES, Authentication
from triton_distributed.wire.decoder import Frame, FrameDecoder
from triton_distributed.wire.hello import SHARED_MEMORY, Hello, hello_frame

WINDOW = 256 * 1024
SESSION_WINDOW = 64 * 1024 * 1024
HELLO = hello_frame(Hello(window=WINDOW))
FOREVER = float("inf")


class Lost(Exception):
    """The session of a stream is gone."""


class Failed(Exception):
    """A stream was ended by a frame: kind, code, detail."""


class Watched(Session):
    """A session that says when its transport is gone."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.gone = asyncio.Event()

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
        self.gone.set()

    @property
    def transport(self) -> asyncio.Transport:
        """The transport of a session that is connected."""
        assert self._transport is not None
        return self._transport

    @property
    def inbound(self) -> Inbound:
        """The reading part of a session that is connected."""
        assert self._inbound is not None
        return self._inbound


def watched(session: Session) -> Watched:
    """A session of a pool or listener of these tests, as the type that they make."""
    assert isinstance(session, Watched)
    return session


def session(
    on_request: Any = None,
    on_lost: Any = lambda lost, reason: None,
    *,
    hello: Hello | None = None,
    window: int = WINDOW,
    session_window: int = SESSION_WINDOW,
    hello_timeout_s: float = PATIENCE_S,
    host_timeout_s: float = 30.0,
    address: str = "",
    token: bytes = b"",
    shared: SharedPool | None = None,
) -> Watched:
    """A session that is not connected."""
    return Watched(
        asyncio.get_running_loop(),
        hello or Hello(window=window, max_frame=f.LARGE_FRAME, features=[] if shared is None else [SHARED_MEMORY]),
        window=window,
        session_window=session_window,
        hello_timeout_s=hello_timeout_s,
        host_timeout_s=host_timeout_s,
        on_request=on_request,
        on_lost=on_lost,
        address=address,
        authentication=Authentication(token, os.urandom(CHALLENGE_BYTES), on_request is None) if token else None,
        shared=shared,
    )


@contextlib.asynccontextmanager
async def half(
    on_request: Any = None, pair: Callable[[], Any] = socket.socketpair, **options: Any
) -> AsyncIterator[tuple[Watched, socket.socket]]:
    """A greeted session and the plain socket at its other end, whose kernel buffers are small."""
    loop = asyncio.get_running_loop()
    here, there = pair()
    for each in (here, there):
        each.setblocking(False)
        each.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
    made = session(on_request, **options)
    await loop.create_connection(lambda: cast(Any, made), sock=here)
    try:
        await loop.sock_sendall(there, hello_frame(Hello(window=1 << 30, max_frame=f.LARGE_FRAME)))
        await made.ready
        yield made, there
    finally:
        there.close()
        made.close()
        async with asyncio.timeout(PATIENCE_S):
            await made.gone.wait()


async def rest_of(sock: socket.socket) -> bytes:
    """Everything until the end."""
    loop = asyncio.get_running_loop()
    data = b""
    async with asyncio.timeout(PATIENCE_S):
        while piece := await loop.sock_recv(sock, 1 << 20):
            data += piece
    return data


class Serving(Owner):
    """A request at the service."""

    def __init__(self, service: Service, stream: Stream, body: bytes, buffers: Any) -> None:
        self.service, self.stream, self.body, self.buffers = service, stream, body, buffers
        self.sent = 0
        self.ended = asyncio.Event()
        stream.owner = self
        self.task: asyncio.Task[None] | None = None
        stream.session.accept(stream, self._begin)

    def _begin(self) -> None:
        self.task = asyncio.get_running_loop().create_task(self._run())
        self.task.add_done_callback(lambda _: self._over())  # also of one that is cancelled before its first step

    def stream_ended(self) -> None: ...

    def stream_silent(self, stream: Stream, words: str) -> None: ...

    def stream_stopped(self) -> None: ...

    def stream_closed(self, stream: Stream) -> None:
        if self.task is not None:
            self.task.cancel()
        else:  # it has not begun, and does not any more
            self._over()

    def _over(self) -> None:
        self.stream.owner = None
        self.ended.set()
        self.service.running.discard(self)

    async def _run(self) -> None:
        stream = self.stream
        verb, _, rest = bytes(self.body).partition(b" ")
        try:
            if verb == b"count":  # that many small items
                for number in range(int(rest)):
                    self.sent += 1
                    if stream.push(msgspec.msgpack.encode(number)):
                        await stream.writable()
            elif verb == b"large":  # that many items of 100,000 bytes
                for number in range(int(rest)):
                    self.sent += 1
                    await stream.send(bytes([number % 256]) * 100_000, ())
            elif verb == b"array":  # what came with the request, so often
                for _ in range(int(rest or b"1")):
                    await stream.send(b"array", [memoryview(each) for each in self.buffers])
            elif verb == b"echo":  # everything that comes
                async for body, buffers in messages(stream):
                    self.sent += 1
                    await stream.send(body, [memoryview(each) for each in buffers])
            else:  # hold: nothing, until it is cancelled
                await asyncio.get_running_loop().create_future()
            stream.end()
        finally:
            self._over()  # in the same turn


class Service:
    """What listens; `async with serving(…)` makes one."""

    def __init__(
        self,
        max_sessions: int = 10_000,
        tls: SessionTls | None = None,
        networks: Networks | None = None,
        health_timeout_s: float = 10.0,
        host_timeout_s: float = 30.0,
        **options: Any,
    ) -> None:
        self.running: set[Serving] = set()
        self.served: list[Serving] = []
        self.came = asyncio.Event()
        self.lost: list[str] = []
        self.addresses: list[str] = []
        self.accepted: list[Watched] = []
        self.listener = Listener(
            asyncio.get_running_loop(),
            lambda on_lost: self._session(on_lost, {"host_timeout_s": host_timeout_s, **options}),
            max_sessions,
            health_timeout_s,
            host_timeout_s,
            tls,
            networks,
        )

    def _session(self, on_lost: Any, options: dict[str, Any]) -> Watched:
        def gone(lost: Session, reason: str) -> None:
            self.lost.append(reason)
            on_lost(lost, reason)

        made = session(self._request, gone, **options)
        self.accepted.append(made)
        return made

    def _request(self, stream: Stream, *request: Any) -> None:
        *_, body, buffers = request
        serving = Serving(self, stream, body, buffers)
        self.running.add(serving)
        self.served.append(serving)
        self.came.set()

    @property
    def address(self) -> str:
        return self.addresses[0]


@contextlib.asynccontextmanager
async def serving(*addresses: str, **options: Any) -> AsyncIterator[Service]:
    """A service until the block is left; by default on a TCP port."""
    service = Service(**options)
    try:
        for each in addresses or ("tcp://127.0.0.1:0",):
            service.addresses.append(str(await service.listener.listen(Address.parse(each))))
        yield service
    finally:
        service.listener.close()
        tasks = [each.task for each in service.running if each.task is not None]
        for task in tasks:
            task.cancel()  # a stream that ended while its handler waits for something else does not end the handler
        if tasks:
            await asyncio.wait(tasks, timeout=PATIENCE_S)
        await closed(*service.accepted)


async def closed(*sessions: Watched) -> None:
    """Wait until the transports of sessions are gone."""
    async with asyncio.timeout(PATIENCE_S):
        for each in sessions:
            if each._transport is not None:
                await each.gone.wait()


class Caller:
    """A pool and calls through it; `async with calling(…)` makes one."""

    def __init__(
        self,
        timeout_s: float,
        health_timeout_s: float,
        host_timeout_s: float,
        tls: SessionTls | None,
        networks: Networks | None,
        options: dict[str, Any],
    ) -> None:
        self.lost: list[tuple[tuple[str, ...], str]] = []
        self.made: list[Watched] = []
        self._options = {"host_timeout_s": host_timeout_s, **options}
        self.pool = SessionPool(
            asyncio.get_running_loop(),
            self._session,
            timeout_s,
            lambda addresses, why: self.lost.append((addresses, why)),
            health_timeout_s,
            host_timeout_s,
            tls,
            networks,
        )

    def _session(self, address: str, on_lost: Any) -> Watched:
        made = session(None, on_lost, address=address, **self._options)
        self.made.append(made)
        return made

    async def call(self, address: str, body: bytes, *buffers: Any, end: bool = True) -> Stream:
        """Send a request; the stream of its responses.

        Raises:
            ConnectionFailed: nobody can be reached there.
            Lost: the session was gone when it was handed out, as any may be.
        """
        async with asyncio.timeout(PATIENCE_S):
            found = await self.pool.connect((address,))
            if found.lost is not None:
                raise Lost(found.lost)
            return await self._send(found, body, buffers, end)

    async def _send(self, found: Session, body: bytes, buffers: tuple[Any, ...], end: bool) -> Stream:
        stream: Stream = found.connection.open_stream(False)
        prefix = f.REQUEST_PREFIX.pack(1, 2, FOREVER, stream.window, 0)
        await stream.send(prefix + body, [memoryview(each) for each in buffers], f.END if end else 0, f.REQUEST)
        return stream


async def until(true: Callable[[], object]) -> None:
    """Turn the loop until something that must come true is."""
    async with asyncio.timeout(PATIENCE_S):
        while not true():
            await asyncio.sleep(0.001)


@contextlib.asynccontextmanager
async def calling(
    timeout_s: float = PATIENCE_S,
    health_timeout_s: float = PATIENCE_S,
    host_timeout_s: float = 30.0,
    tls: SessionTls | None = None,
    networks: Networks | None = None,
    **options: Any,
) -> AsyncIterator[Caller]:
    """A caller until the block is left."""
    caller = Caller(timeout_s, health_timeout_s, host_timeout_s, tls, networks, options)
    try:
        yield caller
    finally:
        await caller.pool.close()
        await closed(*caller.made)


async def messages(stream: Stream) -> AsyncGenerator[tuple[Any, list[Any]]]:
    """What comes on a stream: body and buffers of each item.

    Raises:
        Lost: the session is gone.
        Failed: a frame ended the stream early.
    """
    while True:
        while stream.inbox:
            cost, kind, _, body, buffers = stream.inbox.popleft()
            stream.read(cost)
            if kind == f.BATCH:
                for each in msgspec.msgpack.decode(body, type=list[msgspec.Raw]):
                    yield bytes(each), []
            else:
                yield body, buffers or []
        if stream.lost is not None:
            raise Lost(stream.lost)
        if stream.failure is not None:
            raise Failed(*stream.failure)
        if stream.finished:
            return
        await stream.readable()


async def first(stream: Stream) -> bytes:
    """The body of the next item; what came in one frame with it is dropped."""
    async with asyncio.timeout(PATIENCE_S):
        async with contextlib.aclosing(messages(stream)) as found:
            body, _ = await anext(found)
            return bytes(body)


async def bodies(stream: Stream) -> list[bytes]:
    """The bodies of all items."""
    async with asyncio.timeout(PATIENCE_S):
        return [bytes(body) async for body, _ in messages(stream)]


async def numbers(stream: Stream) -> list[int]:
    """The items of a `count`."""
    return [msgspec.msgpack.decode(each) for each in await bodies(stream)]


class Peer:
    """A connection whose owner says what he likes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def say(self, *data: bytes) -> None:
        for each in data:
            self.writer.write(each)
        await self.writer.drain()

    async def hear(self) -> list[Frame]:
        """Every frame until the end; a reset is an end."""
        data = b""
        async with asyncio.timeout(PATIENCE_S):
            with contextlib.suppress(ConnectionError):
                while piece := await self.reader.read(1 << 20):
                    data += piece
        decoder = FrameDecoder()
        decoder.limit = f.MAX_FRAME
        return decoder.feed(data)

    async def dismissal(self) -> str:
        """The words of the GOAWAY with which the other end closes; everything before it is dropped."""
        kind, _, _, payload = (await self.hear())[-1]
        assert kind == f.GOAWAY
        return payload[1:].decode()

    async def frame(self) -> Frame:
        """The next frame."""
        async with asyncio.timeout(PATIENCE_S):
            size, kind, flags, stream = f.HEADER.unpack(await self.reader.readexactly(f.HEADER_BYTES))
            return kind, flags, stream, await self.reader.readexactly(size)


@contextlib.asynccontextmanager
async def peer(address: str, **options: Any) -> AsyncIterator[Peer]:
    """A raw connection to a service; `options` are those of `asyncio.open_connection`."""
    where = Address.parse(address)
    if where.scheme == "unix":
        reader, writer = await asyncio.open_unix_connection(where.host)
    else:
        reader, writer = await asyncio.open_connection(where.host, where.port, **options)
    try:
        yield Peer(reader, writer)
    finally:
        await _close(writer)


@contextlib.asynccontextmanager
async def answering(answer: Any, **options: Any) -> AsyncIterator[str]:
    """A worker that behaves as `answer(peer)` does, on a TCP port; yields its address."""
    writers: list[asyncio.StreamWriter] = []

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        with contextlib.suppress(ConnectionError):
            await answer(Peer(reader, writer))

    server = await asyncio.start_server(accept, "127.0.0.1", 0, **options)
    try:
        yield f"tcp://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for writer in writers:
            await _close(writer)


async def _close(writer: asyncio.StreamWriter) -> None:
    writer.transport.abort()
    with contextlib.suppress(ConnectionError, ssl.SSLError):
        await writer.wait_closed()


def address_of(scheme: str, folder: Path) -> str:
    """A free address."""
    return {"tcp": "tcp://127.0.0.1:0", "unix": f"unix://{folder}/w.sock", "memory": "memory://w"}[scheme]


def needs_ipv6() -> None:
    """Skip the test where there is no IPv6 loopback."""
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        pytest.skip("this machine has no ::1")
