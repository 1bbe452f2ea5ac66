"""Handlers that take a stream of requests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator
from typing import Any

import pytest

from tests.runtime.cluster import Cluster, drained, into, longer, patiently, turns, until
from triton_distributed.errors import InvalidRequest, RuntimeClosed


async def doubled(requests: AsyncIterator[int]) -> AsyncIterator[int]:
    async for each in requests:
        yield each * 2


async def upto(count: int, item: Any = None) -> AsyncIterator[Any]:
    for n in range(count):
        yield n if item is None else item


@pytest.mark.any_loop
@pytest.mark.parametrize("count", [0, 1, 2, 1000])
async def test_every_request_is_answered(count: int, cluster: Cluster) -> None:
    client = await cluster.connect(doubled)
    found = await patiently(drained(client.generate(upto(count), annotated=False)))
    assert found == [2 * n for n in range(count)]


@pytest.mark.parametrize("hint", [AsyncIterator[int], AsyncIterable[int], AsyncGenerator[int, None], AsyncIterator])
async def test_hints_that_mean_a_stream(hint: Any, cluster: Cluster) -> None:
    async def total(requests):
        return sum([each async for each in requests])

    total.__annotations__["requests"] = hint
    client = await cluster.connect(total)
    assert await patiently(client.call(upto(10))) == 45
    assert await patiently(client.call(5)) == 5  # one request is a stream of one


@pytest.mark.any_loop
async def test_requests_and_answers_take_turns(cluster: Cluster) -> None:
    client = await cluster.connect(doubled)
    queue: asyncio.Queue[int | None] = asyncio.Queue()

    async def requests() -> AsyncIterator[int]:
        while (each := await queue.get()) is not None:
            yield each

    reading = aiter(client.generate(requests(), annotated=False))
    for n in range(20):
        queue.put_nowait(n)
        assert await patiently(anext(reading)) == 2 * n
    queue.put_nowait(None)
    with pytest.raises(StopAsyncIteration):
        await patiently(anext(reading))


async def test_large_requests_and_items(cluster: Cluster) -> None:
    async def sizes(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
        async for each in requests:
            yield len(each)
            yield each

    async def requests() -> AsyncIterator[Any]:
        for size in (1, 1000, 70_000, 300_000, 2_000_000):
            yield b"x" * size
            yield "x" * size

    client = await cluster.connect(sizes)
    found = await patiently(drained(client.generate(requests(), annotated=False)))
    assert [each if isinstance(each, int) else len(each) for each in found] == [
        size for size in (1, 1000, 70_000, 300_000, 2_000_000) for _ in range(4)
    ]


async def test_a_handler_may_end_before_its_requests_do_and_no_answer_is_lost(cluster: Cluster) -> None:
    async def five(requests: AsyncIterator[int]) -> AsyncIterator[int]:
        async for _ in requests:
            for n in range(5):
                yield n
                await asyncio.sleep(0)
            return

    closed = asyncio.Event()

    async def endless() -> AsyncIterator[int]:
        try:
            yield 1
            await asyncio.Event().wait()
        finally:
            closed.set()

    client = await cluster.connect(five)
    stream = client.generate(endless(), annotated=False)
    await until(lambda: not client.stats.inflight)
    await turns(50)
    found = []
    async for item in stream:
        found.append(item)
        await asyncio.sleep(0.001)
    assert found == [0, 1, 2, 3, 4]
    await patiently(closed.wait())
    session = client.pool.get(client.candidates.instances[0].addresses)
    assert session is not None
    await until(lambda: not session.streams)


@pytest.mark.any_loop
async def test_leaving_closes_the_requests_and_cancels_the_handler(cluster: Cluster) -> None:
    ended, closed = asyncio.Event(), asyncio.Event()

    async def handler(requests: AsyncIterator[int]) -> AsyncIterator[int]:
        try:
            async for each in requests:
                yield each
        finally:
            ended.set()

    async def requests() -> AsyncIterator[int]:
        try:
            yield 1
            await asyncio.Event().wait()
        finally:
            closed.set()

    client = await cluster.connect(handler)
    async for _ in client.generate(requests()):
        break
    await patiently(ended.wait())
    await patiently(closed.wait())


async def test_an_error_of_the_requests_reaches_the_caller_and_cancels_the_handler(cluster: Cluster) -> None:
    began, ended = asyncio.Event(), asyncio.Event()

    async def handler(requests: AsyncIterator[int]) -> AsyncIterator[int]:
        try:
            async for each in requests:
                began.set()
                yield each
        except asyncio.CancelledError:
            ended.set()
            raise

    async def requests() -> AsyncIterator[int]:
        yield 1
        await began.wait()  # a handler that is cancelled before its first step sees nothing of it
        raise KeyError("mine")

    client = await cluster.connect(handler)
    with pytest.raises(KeyError, match="mine"):
        await patiently(drained(client.generate(requests())))
    await patiently(ended.wait())


async def test_a_request_that_cannot_travel_is_named(cluster: Cluster) -> None:
    client = await cluster.connect(doubled)
    with pytest.raises(TypeError, match=r'request\["a"\]'):
        await patiently(drained(client.generate(upto(3, {"a": object()}))))
    assert await patiently(drained(client.generate(upto(2), annotated=False))) == [0, 2]


async def test_an_error_of_the_handler_ends_the_requests(cluster: Cluster) -> None:
    closed = asyncio.Event()

    async def handler(requests: AsyncIterator[int]) -> AsyncIterator[int]:
        async for _ in requests:
            raise KeyError("theirs")
            yield 1  # type: ignore[unreachable]

    async def requests() -> AsyncIterator[int]:
        try:
            yield 1
            await asyncio.Event().wait()
        finally:
            closed.set()

    client = await cluster.connect(handler)
    with pytest.raises(KeyError, match="theirs"):
        await patiently(drained(client.generate(requests())))
    await patiently(closed.wait())


async def test_each_request_is_checked(cluster: Cluster) -> None:
    client = await cluster.connect(doubled)
    with pytest.raises(ValueError, match="Invalid request"):
        await patiently(drained(client.generate(upto(3, "text"))))


@pytest.mark.parametrize("count", [0, 1, 2])
async def test_a_handler_of_one_request_refuses_a_stream(count: int, cluster: Cluster) -> None:
    async def one(request: Any) -> Any:
        return request

    client = await cluster.connect(one)
    with pytest.raises(InvalidRequest, match="AsyncIterator"):
        await patiently(drained(client.generate(upto(count))))


async def test_a_handler_that_does_not_read_stops_its_caller(cluster: Cluster) -> None:
    release = asyncio.Event()
    produced = 0

    async def handler(requests: AsyncIterator[str]) -> int:
        await release.wait()
        return len([each async for each in requests])

    async def requests() -> AsyncIterator[str]:
        nonlocal produced
        for _ in range(5000):
            produced += 1
            yield "x" * 1000

    async def echo(request: Any) -> Any:
        return request

    worker = await cluster.worker(handler)
    await cluster.serve(worker, echo, "t.c.echo")
    client, other = await cluster.client(), await cluster.client("t.c.echo")
    call = asyncio.create_task(client.call(requests()))
    before = -1
    while produced != before:
        before = produced
        for n in range(20):
            assert await patiently(other.call(n)) == n
    assert 0 < produced < 2000
    release.set()
    assert await patiently(call) == 5000


async def test_a_deadline_ends_both_directions(cluster: Cluster) -> None:
    closed = asyncio.Event()

    async def requests() -> AsyncIterator[int]:
        try:
            yield 1
            await asyncio.Event().wait()
        finally:
            closed.set()

    client = await cluster.connect(doubled)
    found: list[int] = []
    for limit_s in longer(0.1):
        closed.clear()
        with pytest.raises(TimeoutError):
            await into(found, client.generate(requests(), annotated=False, timeout=limit_s))
        if found:
            break
    assert found == [2]
    await patiently(closed.wait())


async def test_a_stream_of_answers_is_a_stream_of_requests(cluster: Cluster) -> None:
    async def count(request: int) -> AsyncIterator[int]:
        for n in range(request):
            yield n

    await cluster.worker(count, "t.c.count")
    await cluster.worker(doubled, "t.c.doubled")
    first, second = await cluster.client("t.c.count"), await cluster.client("t.c.doubled")
    answers = second.generate(first.generate(5, annotated=False), annotated=False)
    assert await patiently(drained(answers)) == [0, 2, 4, 6, 8]


async def test_requests_that_are_cancelled_are_no_closed_runtime(cluster: Cluster) -> None:
    async def requests() -> AsyncIterator[int]:
        yield 1
        raise asyncio.CancelledError

    client = await cluster.connect(doubled)
    with pytest.raises(BaseException) as caught:  # noqa: PT011
        await patiently(drained(client.generate(requests())))
    assert not isinstance(caught.value, (RuntimeClosed, TimeoutError))
    assert await patiently(drained(client.generate(upto(2), annotated=False))) == [0, 2]
