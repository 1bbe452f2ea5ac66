"""What requests may take of a worker: handlers, bytes, items of a batch."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest

from tests.runtime.cluster import Cluster, drained, patiently, until
from tests.timing import PATIENCE_S
from triton_distributed.errors import DecodeError, Overloaded
from triton_distributed.serving.request import split
from triton_distributed.wire.frames import MOST_ITEMS, array_length, array_of


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    """A worker that takes six requests at once and holds 1 MiB of them, beyond 16 KiB each."""
    made = Cluster(max_requests=6, max_held_bytes=1 << 20, max_message_bytes=1 << 20, retries=0)
    yield made
    await made.close()


async def hold(request: Any) -> AsyncIterator[int]:
    await asyncio.get_running_loop().create_future()
    yield 0


async def test_a_session_has_as_many_requests_as_are_left(cluster: Cluster) -> None:
    worker = await cluster.worker(hold)
    await cluster.serve(worker, hold, "t.c.other")

    def running() -> int:
        return sum(each.inflight for each in worker.stats().values())

    clients = [await cluster.client(), await cluster.client("t.c.other")]
    calls = [asyncio.create_task(drained(await clients[n % 2].generate(n))) for n in range(3)]
    await until(lambda: running() == 3)
    for client in clients:
        with pytest.raises(Overloaded, match="3 of at most 6 .* 3 are of this session: see TRD_MAX_REQUESTS"):
            await patiently(drained(await client.generate(4)))
    late = await cluster.runtime().endpoint("t.c.e").client()  # another session finds room
    calls.append(asyncio.create_task(drained(await late.generate(5))))
    await until(lambda: running() == 4)
    calls.pop(0).cancel()
    await until(lambda: running() == 3)
    for task in calls:
        task.cancel()
    await asyncio.wait(calls)


async def test_a_handler_that_is_cleaning_up_keeps_its_place(cluster: Cluster) -> None:
    """Else whoever opens and cancels could make a worker run any number of them."""
    opened = asyncio.Event()
    cleaning = 0

    async def slow_to_end(request: Any) -> AsyncIterator[int]:
        nonlocal cleaning
        try:
            yield 0
            await asyncio.get_running_loop().create_future()
        finally:
            cleaning += 1
            await opened.wait()

    worker = await cluster.worker(slow_to_end)
    client = await cluster.client()
    for _ in range(6):
        async for _ in await client.generate(None):
            break
    await until(lambda: cleaning == 6)
    with pytest.raises(Overloaded, match="TRD_MAX_REQUESTS"):
        await patiently(drained(await client.generate(None)))
    opened.set()
    await until(lambda: not any(each.inflight for each in worker.stats().values()))
    async for item in await client.generate(None):
        assert item.data() == 0
        break


async def test_what_is_streamed_and_not_read_is_bounded_for_all_together(cluster: Cluster) -> None:
    reads = asyncio.Event()

    async def deaf(requests: AsyncIterator[bytes]) -> AsyncIterator[int]:
        await reads.wait()
        async for _ in requests:
            pass
        yield 1

    await cluster.serve(cluster.runtime(max_requests=100, window_bytes=256 * 1024), deaf)
    client = await cluster.client()

    async def piece() -> AsyncIterator[bytes]:
        for _ in range(15):
            yield bytes(15_000)
        await reads.wait()

    async def call() -> Any:
        return await drained(await client.generate(piece(), annotated=False))

    calls = []
    refused: list[BaseException] = []
    for _ in range(12):
        calls.append(asyncio.create_task(call()))
    await until(lambda: sum(each.done() for each in calls) >= 6)
    reads.set()
    done, _ = await asyncio.wait(calls, timeout=PATIENCE_S)
    assert len(done) == 12
    for each in calls:
        if (error := each.exception()) is not None:
            refused.append(error)
        else:
            assert each.result() == [1]
    assert 6 <= len(refused) < 12
    assert all("TRD_MAX_HELD_BYTES" in str(each) for each in refused)
    again = await client.generate(piece(), annotated=False)  # what was held was let go
    assert await patiently(drained(again)) == [1]


@pytest.mark.parametrize("size", [200_000, 900_000])
async def test_bodies_count_while_they_are_served(cluster: Cluster, size: int) -> None:
    await cluster.serve(cluster.runtime(max_requests=100), hold)
    client = await cluster.client()

    async def call() -> Any:
        return await drained(await client.generate("x" * size))

    calls = [asyncio.create_task(call()) for _ in range(8)]
    fit = (1 << 20) // size
    await until(lambda: sum(each.done() for each in calls) == 8 - fit)
    for each in calls:
        if each.done():
            assert "TRD_MAX_HELD_BYTES" in str(each.exception())
        else:
            each.cancel()
    await asyncio.wait(calls)
    for _ in range(3):  # as often as one likes, one after the other
        late = asyncio.create_task(call())
        done, _ = await asyncio.wait([late], timeout=0.1)
        assert not done
        late.cancel()
        await asyncio.wait([late])


def test_the_length_of_an_array_is_read_without_its_items() -> None:
    for number in (0, 1, 15, 16, 65_535, 65_536, 100_000):
        assert array_length(array_of([b"\xc0"] * number)) == number
    for none in (b"", b"\xc0", b"\x81\x01\x02", b"\xdd\xff", msgspec.msgpack.encode("text")):
        assert array_length(none) <= 0xFF
    assert array_length(b"\xdd\xff\xff\xff\xff") == 2**32 - 1
    assert array_length(memoryview(b"\xdc\x01\x00")) == 256


def test_a_batch_of_too_many_items_is_refused_before_it_is_taken_apart() -> None:
    assert len(split(array_of([b"\xc0"] * MOST_ITEMS))) == MOST_ITEMS
    for bad in (array_of([b"\xc0"] * (MOST_ITEMS + 1)), b"\xdd\xff\xff\xff\xff", b"\x05", b""):
        with pytest.raises(DecodeError, match="batch"):
            split(bad)
