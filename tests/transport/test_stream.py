"""Streams end to end: who does not read stops one producer and nobody else, and limits are checked where one sends."""

from __future__ import annotations

import asyncio

import pytest

from tests.timing import PATIENCE_S
from tests.transport.sessions import (
    SESSION_WINDOW,
    WINDOW,
    Caller,
    Service,
    address_of,
    bodies,
    calling,
    messages,
    numbers,
    serving,
)
from triton_distributed.errors import MessageTooLarge
from triton_distributed.transport.stream import Stream
from triton_distributed.wire import frames as f
from triton_distributed.wire.hello import Hello
from triton_distributed.wire.window import FRAME_COST, SLACK, SMALLEST_WINDOW

pytestmark = pytest.mark.any_loop


async def at_rest(service: Service, caller: Caller, number: int) -> int:
    """What request `number` of the service has sent when it sends no more, though its session carries everybody else's."""
    sent = 0
    async with asyncio.timeout(PATIENCE_S):
        while len(service.served) <= number or not service.served[number].sent:
            await asyncio.sleep(0)
        while service.served[number].sent != sent:
            sent = service.served[number].sent
            assert await numbers(await caller.call(service.address, b"count 2000")) == [*range(2000)]
    return sent


def unread(stream: Stream) -> int:
    """Bytes that wait to be read, as flow control counts them."""
    return sum(len(body) + sum(map(len, buffers or ())) + FRAME_COST for _, _, _, body, buffers in stream.inbox)


@pytest.mark.parametrize("scheme", ["tcp", "unix", "memory"])
async def test_who_does_not_read_stops_his_producer_and_nobody_else(trd_dir, scheme):
    async with serving(address_of(scheme, trd_dir)) as service, calling() as caller:
        idle = await caller.call(service.address, b"count 100000")
        sent = await at_rest(service, caller, 0)
        assert 0 < sent < 100_000
        assert unread(idle) <= WINDOW + SLACK
        assert await numbers(idle) == [*range(100_000)]
        assert len(caller.made) == 1


async def test_large_items_wait_as_small_ones_do():
    async with serving() as service, calling() as caller:
        idle = await caller.call(service.address, b"large 500")
        sent = await at_rest(service, caller, 0)
        assert (sent - 2) * 100_000 <= WINDOW + SLACK
        assert unread(idle) <= WINDOW + SLACK
        found = 0
        async with asyncio.timeout(PATIENCE_S):
            async for body, _ in messages(idle):
                assert body == bytes([found % 256]) * 100_000
                found += 1
        assert found == 500


async def test_a_service_that_does_not_read_stops_its_caller():
    async with serving() as service, calling() as caller:
        stream = await caller.call(service.address, b"hold", end=False)
        sent = 0

        async def send() -> None:
            nonlocal sent
            for _ in range(500):
                await stream.send(bytes(100_000), ())
                sent += 1

        sending = asyncio.ensure_future(send())
        before = -1
        async with asyncio.timeout(PATIENCE_S):
            while sent != before:
                before = sent
                assert len(await numbers(await caller.call(service.address, b"count 2000"))) == 2000
        assert 0 < sent * 100_000 <= WINDOW + SLACK
        assert unread(service.served[0].stream) <= WINDOW + SLACK
        stream.abort(f.CANCEL)  # and whoever waits to send goes on, to no effect
        async with asyncio.timeout(PATIENCE_S):
            await sending


async def test_many_idle_consumers_share_the_budget_of_their_session():
    total, streams = 1 << 20, 200
    async with serving() as service, calling(session_window=total) as caller:
        idle = [await caller.call(service.address, b"count 50000") for _ in range(streams)]
        for number in (0, streams - 1):
            await at_rest(service, caller, number)
        windows = sum(each.window for each in idle)
        assert windows <= total + streams * SMALLEST_WINDOW
        assert sum(map(unread, idle)) <= windows + streams * SLACK // 8  # small items overshoot by a turn's rest
        assert await numbers(idle[0]) == await numbers(idle[-1]) == [*range(50_000)]


async def test_an_honest_peer_is_never_above_its_credit_however_small_the_budget():
    """Two-way streams whose service reads nothing, while its budget gives each the smallest window."""
    async with serving(session_window=64 * 1024) as service, calling() as caller:
        streams = [await caller.call(service.address, b"hold", end=False) for _ in range(8)]
        sending = [asyncio.ensure_future(_send(each, 20, 250_000)) for each in streams]
        echo = await caller.call(service.address, b"echo", end=False)
        async with asyncio.timeout(PATIENCE_S):
            for size in (10, 250_000, 400_000):
                await echo.send(bytes(size), ())
            echo.end()
        assert await bodies(echo) == [bytes(10), bytes(250_000), bytes(400_000)]
        assert service.lost == []
        for stream in streams:
            stream.abort(f.CANCEL)
        async with asyncio.timeout(PATIENCE_S):
            await asyncio.gather(*sending)


async def _send(stream: Stream, number: int, size: int) -> None:
    for _ in range(number):
        await stream.send(bytes(size), ())


async def test_items_keep_their_order_whatever_their_size():
    sizes = [1, 100_000, 5, 70_000, 3, 300_000, 2, f.MAX_FRAME, 1, f.MAX_FRAME + 1] * 3
    async with serving() as service, calling() as caller:
        stream = await caller.call(service.address, b"echo", end=False)
        items = [bytes([at]) * size for at, size in enumerate(sizes)]

        async def send() -> None:
            for item in items:
                if len(item) > f.SMALL:
                    await stream.send(item, ())
                elif stream.push(item):
                    await stream.writable()
            stream.end()

        sending = asyncio.ensure_future(send())
        assert await bodies(stream) == items
        async with asyncio.timeout(PATIENCE_S):
            await sending


LIMIT = 100_000


@pytest.mark.parametrize("limited", ["here", "there"])
async def test_a_message_above_the_limit_raises_where_it_is_sent_and_harms_nobody(limited):
    low, high = Hello(max_message=LIMIT, window=WINDOW), Hello(window=WINDOW)
    service_hello, caller_hello = (high, low) if limited == "here" else (low, high)
    async with serving(hello=service_hello) as service, calling(hello=caller_hello) as caller:
        other = await caller.call(service.address, b"count 50000")
        stream = await caller.call(service.address, b"echo", end=False)
        for body, buffers in (
            (bytes(LIMIT + 1), []),
            (b"", [bytes(LIMIT)]),  # with its head it is above
            (bytes(10), [bytes(60_000), bytes(60_000)]),
            (b"", [bytes(1 << 24)]),
        ):
            with pytest.raises(MessageTooLarge, match=r"the item has .* above the limit of 100,000.*TRD_MAX_MESSAGE"):
                await stream.send(body, [memoryview(each) for each in buffers])
        with pytest.raises(MessageTooLarge, match="the request has"):
            await caller.call(service.address, b"echo" + bytes(LIMIT))
        await stream.send(bytes(LIMIT), ())
        await stream.send(b"", [memoryview(bytes(LIMIT - 16))])
        stream.end()
        got = []
        async with asyncio.timeout(PATIENCE_S):
            async for body, buffers in messages(stream):
                got.append(len(body) + sum(map(len, buffers)))
        assert got == [LIMIT, LIMIT - 16]
        assert await numbers(other) == [*range(50_000)]
        assert len(caller.made) == 1
        caller.made[0].streams.clear()  # the request that was never sent


async def test_an_honest_peer_may_have_many_messages_of_the_largest_size_under_way():
    hello = Hello(max_message=1 << 20, window=WINDOW)
    async with serving(hello=hello) as service, calling(hello=hello) as caller:
        buffer = bytes((1 << 20) - 1000)
        streams = await asyncio.gather(*[caller.call(service.address, b"array", buffer) for _ in range(12)])
        for stream in streams:
            async with asyncio.timeout(PATIENCE_S):
                ((body, buffers),) = [each async for each in messages(stream)]
            assert body == b"array"
            assert bytes(buffers[0]) == buffer
        assert service.lost == []


async def test_the_budget_of_a_session_is_whole_when_its_streams_are_over():
    async with serving() as service, calling() as caller:
        for verb in (b"count 1000", b"large 5", b"count 0"):
            await bodies(await caller.call(service.address, verb))
        at_once, later = [await caller.call(service.address, b"hold") for _ in range(2)]
        at_once.abort(f.CANCEL)
        async with asyncio.timeout(PATIENCE_S):
            while len(service.served) < 5:
                await asyncio.sleep(0)
            later.abort(f.CANCEL)
            for each in service.served:
                await each.ended.wait()
        for session in (caller.made[0], service.accepted[0]):
            assert session.streams == {}
            assert session.connection._budget._left == SESSION_WINDOW
