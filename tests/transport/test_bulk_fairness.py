"""Small messages beside a large one, counted in frames: none waits for more than one fragment that was cut after it."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from itertools import accumulate

import pytest

from tests.timing import PATIENCE_S
from tests.transport.sessions import FOREVER, Watched, half
from triton_distributed.transport.stream import Stream
from triton_distributed.wire import frames as f
from triton_distributed.wire.decoder import Frame, FrameDecoder
from triton_distributed.wire.window import FRAME_COST

pytestmark = pytest.mark.any_loop
LARGE = bytes(48 << 20)


class Beside:
    """A large message on its way to a plain socket, and small requests beside it."""

    def __init__(self, session: Watched, there: socket.socket) -> None:
        self.session, self.there = session, there
        self.large: Stream = session.connection.open_stream(False)
        self.credit = self.large.credit
        self.sending = asyncio.ensure_future(
            self.large.send(f.request_prefix(1, 2, FOREVER, 0, b""), [memoryview(LARGE)], f.END, f.REQUEST)
        )
        self.asked: dict[int, int] = {}  # by stream: bytes of the large message that were cut when it was wanted
        self.calls: set[asyncio.Task[None]] = set()  # that wait
        self.decoder = FrameDecoder()
        self.decoder.limit = f.LARGE_FRAME
        self.frames: list[Frame] = []

    def call(self) -> None:
        """Make a small request, as a client does: it waits while the kernel accepts nothing."""
        if self.sending.done():
            return
        cut = self.credit - self.large.credit

        async def send() -> None:
            while self.session.paused:
                await self.session.resumed()
            self.asked[self.session.connection.request(1, 2, FOREVER, b"", b"small").id] = cut

        task = asyncio.ensure_future(send())
        self.calls.add(task)
        task.add_done_callback(self.calls.discard)

    async def read(self, most: int, between: Callable[[], object]) -> None:
        """Read until the large message has left, `most` bytes at a time."""
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(PATIENCE_S):
            while not self.sending.done() or self.calls or self.session.connection.out:
                self.frames += self.decoder.feed(await loop.sock_recv(self.there, most))
                between()
            await self.sending
            self.session.connection.send(f.frame(f.PING, 0, b"last"))
            while not self.frames or self.frames[-1][0] != f.PING:
                self.frames += self.decoder.feed(await loop.sock_recv(self.there, most))

    def waited_for(self) -> list[int]:
        """The number of fragments that each small request had to wait for, without those that were cut before it."""
        sizes = [len(payload) + FRAME_COST if number == self.large.id else 0 for _, _, number, payload in self.frames]
        ends = [*accumulate(sizes)]
        return [
            sum(size > 0 and end - size >= self.asked[number] for size, end in zip(sizes[:at], ends, strict=False))
            for at, (kind, _, number, _) in enumerate(self.frames)
            if kind == f.REQUEST and number in self.asked
        ]

    def received(self) -> int:
        """Bytes of the large message that arrived."""
        return sum(len(payload) for _, _, number, payload in self.frames if number == self.large.id)


@pytest.mark.parametrize("every", [1, 7, 20])
@pytest.mark.parametrize("most", [30_000, 1 << 20])
async def test_no_small_request_waits_for_more_than_one_fragment(every, most):
    reads = 0

    def between() -> None:
        nonlocal reads
        reads += 1
        if reads % every == 0:
            beside.call()

    async with half() as (session, there):
        beside = Beside(session, there)
        await beside.read(most, between)
        waited = beside.waited_for()
        assert len(waited) == len(beside.asked) > 0
        assert max(waited) <= 1
        assert beside.received() > len(LARGE)


async def test_small_requests_do_not_keep_a_large_one_away():
    """Three requests are always waiting, more than a full kernel takes at once."""

    def between() -> None:
        while len(beside.calls) < 3 and not beside.sending.done():
            beside.call()

    async with half() as (session, there):
        beside = Beside(session, there)
        await beside.read(1 << 16, between)
        assert beside.received() > len(LARGE)


async def test_fragments_are_large_when_nothing_else_is_sent():
    async with half() as (session, there):
        beside = Beside(session, there)
        await beside.read(1 << 20, lambda: None)
        sizes = [len(payload) for *_, payload in beside.frames[:-1]]
        assert sorted(sizes)[len(sizes) // 2] == f.LARGE_FRAME
