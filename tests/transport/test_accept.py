"""A handler begins when the kernel has the words that say so, and not where its stream is closed before."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest

from tests.timing import PATIENCE_S
from tests.transport.sessions import Watched, half
from tests.wire.joined import request
from triton_distributed.transport.stream import Stream
from triton_distributed.wire import frames as f
from triton_distributed.wire.decoder import FrameDecoder

pytestmark = pytest.mark.any_loop
HUGE = 1 << 30


class Handlers:
    """Accepts every request of a session, and knows which handlers began.

    Attributes:
        streams: of the requests that came, by number.
        begun: (number, the kernel took nothing at that moment) each.
    """

    def __init__(self) -> None:
        self.streams: dict[int, Stream] = {}
        self.begun: list[tuple[int, bool]] = []

    def __call__(self, stream: Stream, *request: Any) -> None:
        self.streams[stream.id] = stream
        session = stream.connection
        session.accept(stream, lambda: self.begun.append((stream.id, session.paused)))

    async def has(self, number: int) -> None:
        """Wait until request `number` is here."""
        async with asyncio.timeout(PATIENCE_S):
            while number not in self.streams:
                await asyncio.sleep(0)


class Reader:
    """The far end of a session, read when the test says so."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._decoder = FrameDecoder()
        self._decoder.limit = f.MAX_FRAME
        self.accepted: list[int] = []

    async def read(self) -> bool:
        """Take what is there, at least something; False at the end."""
        async with asyncio.timeout(PATIENCE_S):
            data = await asyncio.get_running_loop().sock_recv(self._sock, 1 << 16)
        for kind, _, _, payload in self._decoder.feed(data):
            if kind == f.ACCEPT:
                self.accepted += [number for (number,) in f.UINT64.iter_unpack(payload)]
        return bool(data)


async def say(there: socket.socket, *data: bytes) -> None:
    async with asyncio.timeout(PATIENCE_S):
        await asyncio.get_running_loop().sock_sendall(there, b"".join(data))


async def stopped(made: Watched, there: socket.socket, handlers: Handlers) -> None:
    """Serve request 1 until the kernel takes nothing any more."""
    await say(there, request(1, window=HUGE))
    await handlers.has(1)
    async with asyncio.timeout(PATIENCE_S):
        while not made.paused:
            handlers.streams[1].push(bytes(10_000))
            await asyncio.sleep(0)
    assert handlers.begun == [(1, False)]


async def settled() -> None:
    """Let everything that is ready run."""
    for _ in range(20):
        await asyncio.sleep(0)


async def test_while_the_kernel_takes_nothing_no_handler_begins():
    handlers = Handlers()
    async with half(handlers) as (made, there):
        await stopped(made, there, handlers)
        await say(there, *(request(number, window=HUGE) for number in (2, 3, 4)))
        await handlers.has(4)
        await settled()
        assert made.paused
        assert [number for number, _ in handlers.begun] == [1]
        reader = Reader(there)
        while len(handlers.begun) < 4:
            assert await reader.read()
        assert handlers.begun == [(1, False), (2, False), (3, False), (4, False)]
        while 4 not in reader.accepted:  # the words were on their way when they began
            assert await reader.read()
        assert reader.accepted == [1, 2, 3, 4]


async def test_when_a_handler_begins_its_peer_can_know():
    """Whatever kills this process in the handler's first step, the words are out."""
    seen: list[bytes] = []

    def accept(stream: Stream, *request: Any) -> None:
        stream.connection.accept(stream, lambda: seen.append(there.recv(1 << 16, socket.MSG_PEEK)))

    async with half(accept) as (_, there):
        await say(there, request(1))
        async with asyncio.timeout(PATIENCE_S):
            while not seen:
                await asyncio.sleep(0)
        assert seen[0].endswith(f.frame(f.ACCEPT, 0, f.UINT64.pack(1)))


async def test_one_that_is_let_in_later_begins_as_soon_as_it_is_announced():
    """As from a queue, when no bytes are being received."""
    waiting: list[Stream] = []
    handlers = Handlers()
    async with half(lambda stream, *request: waiting.append(stream)) as (_, there):
        await say(there, request(1))
        async with asyncio.timeout(PATIENCE_S):
            while not waiting:
                await asyncio.sleep(0)
        handlers(waiting[0])
        assert handlers.begun == [(1, False)]
        reader = Reader(there)
        assert await reader.read()
        while not reader.accepted:
            assert await reader.read()


@pytest.mark.parametrize("who", ["the peer cancels", "this end aborts"])
async def test_what_is_over_before_the_kernel_has_the_words_never_begins(who):
    handlers = Handlers()
    async with half(handlers) as (made, there):
        await stopped(made, there, handlers)
        await say(there, request(2), request(3), request(4))
        await handlers.has(4)
        over = handlers.streams[3]
        if who == "the peer cancels":
            await say(there, f.frame(f.CANCEL, 3), request(5))
            await handlers.has(5)
        else:
            over.abort(f.ERROR, f.ErrorCode.DEADLINE)
            await say(there, request(5))
            await handlers.has(5)
        reader = Reader(there)
        while len(handlers.begun) < 4:
            assert await reader.read()
        await settled()
        assert [number for number, _ in handlers.begun] == [1, 2, 4, 5]


async def test_a_request_that_comes_together_with_its_cancellation_never_begins():
    handlers = Handlers()
    async with half(handlers) as (_, there):
        await say(there, request(1), f.frame(f.CANCEL, 1), request(2))
        await handlers.has(2)
        await settled()
        assert handlers.begun == [(2, False)]


@pytest.mark.parametrize("how", ["the peer is gone", "this end closes"])
async def test_in_a_lost_session_nothing_begins(how):
    handlers = Handlers()
    async with half(handlers) as (made, there):
        await stopped(made, there, handlers)
        await say(there, request(2))
        await handlers.has(2)
        if how == "the peer is gone":
            there.close()
        else:
            made.close()
            assert made.lost is not None
            reader = Reader(there)
            while await reader.read():  # all that waited was taken
                pass
        async with asyncio.timeout(PATIENCE_S):
            await made.gone.wait()
        await settled()
        assert [number for number, _ in handlers.begun] == [1]


async def test_nothing_is_kept_of_requests_that_are_cancelled_while_the_kernel_is_full():
    handlers = Handlers()
    async with half(handlers) as (made, there):
        await stopped(made, there, handlers)
        for number in range(2, 500):
            await say(there, request(number), f.frame(f.CANCEL, number))
            handlers.streams.pop(number - 1, None)
        await handlers.has(499)
        await say(there, request(500))
        await handlers.has(500)
        assert made.paused
        assert list(made.acceptance.accepted) == [handlers.streams[500]]
