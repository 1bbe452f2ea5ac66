"""Transports in memory: pairs that behave as sockets do."""

from __future__ import annotations

import asyncio

import pytest

from tests.timing import PATIENCE_S
from tests.transport.sessions import bodies, calling, numbers, serving
from triton_distributed.transport import memory
from triton_distributed.transport.memory import HIGH_WATER, READ_BYTES, MemoryTransport

pytestmark = pytest.mark.any_loop


class Noted(asyncio.Protocol):
    def __init__(self) -> None:
        self.told: list[str] = []
        self.data = b""
        self.largest = 0
        self.transport: MemoryTransport
        self.lost = asyncio.Event()

    def connection_made(self, transport) -> None:
        self.transport = transport
        self.told.append("made")

    def data_received(self, data: bytes) -> None:
        self.data += data
        self.largest = max(self.largest, len(data))

    def pause_writing(self) -> None:
        self.told.append("paused")

    def resume_writing(self) -> None:
        self.told.append("resumed")

    def connection_lost(self, error) -> None:
        self.told.append("lost")
        self.lost.set()


async def pair() -> tuple[Noted, Noted]:
    one, other = Noted(), Noted()
    MemoryTransport.pair(asyncio.get_running_loop(), one, other)
    await asyncio.sleep(0)
    assert one.told == other.told == ["made"]
    return one, other


async def lost(*protocols: Noted) -> None:
    async with asyncio.timeout(PATIENCE_S):
        for each in protocols:
            await each.lost.wait()


async def test_bytes_arrive_in_order_in_a_later_turn():
    one, other = await pair()
    one.transport.write(b"a")
    one.transport.writelines([b"b", memoryview(b"c")])
    assert other.data == b""
    one.transport.close()
    await lost(one, other)
    assert other.data == b"abc"
    assert one.told == other.told == ["made", "lost"]


async def test_what_is_written_is_the_writers_no_more():
    one, other = await pair()
    data = bytearray(b"before")
    one.transport.write(data)
    data[:] = b"after!"
    one.transport.close()
    await lost(one, other)
    assert other.data == b"before"


async def test_a_writer_that_is_too_far_ahead_is_paused():
    one, other = await pair()
    for _ in range(6):
        one.transport.write(bytes(HIGH_WATER // 2))
    assert one.told == ["made", "paused"]
    one.transport.close()
    await lost(one, other)
    assert one.told == ["made", "paused", "resumed", "lost"]
    assert len(other.data) == 3 * HIGH_WATER
    assert other.largest <= READ_BYTES + HIGH_WATER // 2


async def test_closing_delivers_and_aborting_does_not():
    one, other = await pair()
    one.transport.write(b"a")
    one.transport.abort()
    one.transport.write(b"b")
    assert one.transport.is_closing()
    await lost(one, other)
    assert other.data == b""
    assert one.told == other.told == ["made", "lost"]


async def test_both_ends_may_close_at_once():
    one, other = await pair()
    one.transport.close()
    other.transport.close()
    one.transport.close()
    await lost(one, other)
    assert one.told == other.told == ["made", "lost"]


@pytest.mark.parametrize("written_first", [False, True])
async def test_nothing_is_received_after_closing(written_first):
    """As with sockets: who has closed hears nothing more."""
    one, other = await pair()
    if written_first:
        one.transport.write(b"too late")
    other.transport.close()
    one.transport.write(b"too late")
    await lost(one, other)
    assert other.data == b""


async def test_names():
    loop = asyncio.get_running_loop()
    network = memory.network_of(loop)
    stop = network.listen("w", Noted)
    with pytest.raises(OSError, match="memory://w has a listener already"):
        network.listen("w", Noted)
    stop()
    with pytest.raises(ConnectionRefusedError, match="nothing listens on memory://w"):
        network.connect(loop, "w", Noted())
    network.listen("w", Noted)()


async def test_sessions():
    async with serving("memory://w") as service, calling() as caller:
        assert await numbers(await caller.call(service.address, b"count 1000")) == [*range(1000)]
        body = bytes(range(256)) * 4000
        stream = await caller.call(service.address, b"echo", end=False)
        await stream.send(body, ())
        stream.end()
        assert await bodies(stream) == [body]
    assert service.lost == ["the runtime at this end was shut down"]
