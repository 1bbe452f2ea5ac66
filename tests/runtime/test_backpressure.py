"""A consumer that does not read stops its own producer, and nobody else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.runtime.cluster import Cluster, drained, patiently, until
from tests.timing import PATIENCE_S
from triton_distributed.runtime import Client

ITEM = 1000
WINDOW = 256 * 1024
# What may be under way unread: the window, what one turn of the loop writes beyond it, and one item at a yield.
MOST = 3 * WINDOW // ITEM


class Producer:
    """Counts what it has produced."""

    def __init__(self, size: int = ITEM) -> None:
        self.size = size
        self.produced = 0

    async def __call__(self, request: int) -> AsyncIterator[Any]:
        for _ in range(request):
            self.produced += 1
            yield "x" * self.size


async def echo(request: Any) -> Any:
    return request


async def stands_still(count: Any, beside: Client) -> int:
    """The value of `count()` once it has stopped to change while others are served."""
    before = -1
    async with asyncio.timeout(PATIENCE_S):
        while count() != before:
            before = count()
            for n in range(20):
                assert await beside.call(n) == n
    return before


@pytest.mark.any_loop
@pytest.mark.parametrize("where", ["memory", "unix"])
async def test_a_slow_consumer_stops_its_producer_and_nobody_else(where: str, cluster: Cluster, unix: Cluster) -> None:
    here = cluster if where == "memory" else unix
    producer, other = Producer(), Producer()
    worker = await here.worker(producer)
    await here.serve(worker, echo, "t.c.echo")
    await here.serve(worker, other, "t.c.other")
    beside = await here.client("t.c.echo")
    client = await here.client()
    stream = client.generate(20_000, annotated=False)
    assert 0 < await stands_still(lambda: producer.produced, beside) < MOST
    # the same session carries another's flood meanwhile
    assert len(await patiently(drained((await here.client("t.c.other")).generate(5000)))) == 5000
    assert producer.produced < MOST
    reading = aiter(stream)
    for _ in range(5000):
        await patiently(anext(reading))
    assert await stands_still(lambda: producer.produced, beside) < 5000 + MOST
    assert len([item async for item in reading]) == 15_000
    assert producer.produced == 20_000


async def test_memory_is_bounded_by_windows_whatever_the_number_of_streams(cluster: Cluster) -> None:
    producers = [Producer() for _ in range(40)]
    worker = await cluster.worker(echo, "t.c.echo")
    for n, producer in enumerate(producers):
        await cluster.serve(worker, producer, f"t.c.e{n}")
    beside = await cluster.client("t.c.echo")
    streams = [(await cluster.client(f"t.c.e{n}")).generate(20_000) for n in range(40)]
    assert await stands_still(lambda: sum(each.produced for each in producers), beside) < 40 * MOST
    for each in streams:
        each.cancel()


async def test_large_items_wait_too(cluster: Cluster) -> None:
    producer = Producer(3_000_000)
    worker = await cluster.worker(producer)
    await cluster.serve(worker, echo, "t.c.echo")
    beside = await cluster.client("t.c.echo")
    stream = (await cluster.client()).generate(50, annotated=False)
    assert await stands_still(lambda: producer.produced, beside) <= 3
    assert [len(each) for each in await patiently(drained(stream))] == [3_000_000] * 50


async def test_a_pipeline_stands_still_from_its_end_to_its_beginning(cluster: Cluster) -> None:
    producer = Producer()
    await cluster.worker(producer, "t.c.first")
    await cluster.worker(echo, "t.c.echo")

    async def middle(request: int) -> AsyncIterator[Any]:
        async for item in (await cluster.client("t.c.first")).generate(request, annotated=False):
            yield item

    await cluster.worker(middle, "t.c.second")
    beside = await cluster.client("t.c.echo")
    stream = (await cluster.client("t.c.second")).generate(20_000, annotated=False)
    assert 0 < await stands_still(lambda: producer.produced, beside) < 2 * MOST
    assert len(await patiently(drained(stream))) == 20_000


async def test_a_call_that_nobody_reads_does_not_stand_still(cluster: Cluster) -> None:
    producer = Producer()
    client = await cluster.connect(producer)
    client.generate(5000)
    await until(lambda: producer.produced == 5000 and not client.stats.inflight)


async def test_small_items_are_bounded_by_their_bytes_and_not_by_their_number(cluster: Cluster) -> None:
    producer = Producer(1)
    worker = await cluster.worker(producer)
    await cluster.serve(worker, echo, "t.c.echo")
    beside = await cluster.client("t.c.echo")
    stream = (await cluster.client()).generate(2_000_000)
    assert await stands_still(lambda: producer.produced, beside) < 3 * WINDOW
    stream.cancel()
