"""A handler that returns the stream of a call passes its items on, without decoding what needs no decoding."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

import numpy as np
import pytest

from tests.runtime.cluster import Cluster, drained, into, patiently
from triton_distributed import is_compiled
from triton_distributed.annotated import Annotated
from triton_distributed.errors import RemoteError
from triton_distributed.payload.codec import encode
from triton_distributed.payload.passing import Batch, Passable
from triton_distributed.runtime import Client, Context

ITEMS: list[Any] = [0, "text", b"bytes", {"a": [1, 2.5, None]}, [], 2**63, bytes(100_000), "x" * 100_000, (1, 2)]


def generator(client: Client, **options: Any) -> Any:
    async def relay(request: Any) -> AsyncIterator[Any]:
        async for item in client.generate(request, **options):
            yield item

    return relay


def returned(client: Client, **options: Any) -> Any:
    async def relay(request: Any) -> Any:
        return client.generate(request, **options)

    return relay


async def chain(cluster: Cluster, handler: Any, relay: Callable[..., Any], **options: Any) -> Client:
    """A client of a relay of a relay of the handler."""
    await cluster.worker(handler, "t.c.last")
    await cluster.worker(relay(await cluster.client("t.c.last"), **options), "t.c.middle")
    await cluster.worker(relay(await cluster.client("t.c.middle"), **options), "t.c.first")
    return await cluster.client("t.c.first")


async def produce(request: Any) -> AsyncIterator[Any]:
    for item in ITEMS:
        yield item
        yield None
    yield np.arange(50_000)
    for number in range(2_000):
        yield number


@pytest.mark.parametrize("relay", [generator, returned])
@pytest.mark.parametrize("annotated", [False, True])
async def test_the_items_are_those_of_a_relay_that_reads_them(annotated: bool, relay: Any, cluster: Cluster) -> None:
    client = await chain(cluster, produce, relay, annotated=annotated)
    got = await patiently(drained(client.generate(None, annotated=False)))
    expected = [*ITEMS[:-1], [1, 2], np.arange(50_000), *range(2_000)]
    assert [type(item) for item in got] == [type(item) for item in expected]
    assert all(np.array_equal(one, other) for one, other in zip(got, expected, strict=True))


@pytest.mark.skipif(is_compiled(), reason="compiled code calls `encode` directly, so no test can replace it")
async def test_small_items_are_not_decoded(cluster: Cluster) -> None:
    passed: list[bytes] = []

    class Watched(Passable):
        """A stream that notes which items pass as they came."""

        def __init__(self, stream: Any) -> None:
            self.stream = stream

        def pass_on(self, batch: Batch) -> None:
            def noted(items: Iterable[bytes]) -> Any:
                items = list(items)
                passed.extend(items)
                return batch(items)

            self.stream.pass_on(noted)

        def __aiter__(self) -> Any:
            return aiter(self.stream)

    async def count(request: Any) -> AsyncIterator[int]:
        for number in range(3_000):
            yield number

    await cluster.worker(count, "t.c.last")
    last = await cluster.client("t.c.last")

    async def relay(request: Any) -> Any:
        return Watched(last.generate(request, annotated=False))

    await cluster.worker(relay, "t.c.first")
    client = await cluster.client("t.c.first")
    assert await patiently(drained(client.generate(None))) == [Annotated(number) for number in range(3_000)]
    assert passed == [encode(number) for number in range(3_000)]


async def test_an_annotated_handler_still_checks_each_item(cluster: Cluster) -> None:
    await cluster.worker(produce, "t.c.last")
    last = await cluster.client("t.c.last")

    async def relay(request: Any) -> AsyncIterator[int]:
        return last.generate(request, annotated=False)

    await cluster.worker(relay, "t.c.first")
    got: list[Any] = []
    with pytest.raises(RemoteError):
        await into(got, (await cluster.client("t.c.first")).generate(None, annotated=False))
    assert got == [0]


async def test_an_error_comes_after_the_items(cluster: Cluster) -> None:
    async def broken(request: Any) -> AsyncIterator[int]:
        for number in range(100):
            yield number
        raise LookupError("no more")

    client = await chain(cluster, broken, returned, annotated=False)
    got: list[Any] = []
    with pytest.raises(LookupError, match="no more"):
        await into(got, client.generate(None, annotated=False))
    assert got == list(range(100))


async def test_leaving_reaches_the_first_handler_and_a_slow_reader_holds_it_back(cluster: Cluster) -> None:
    left, made = asyncio.Event(), 0

    async def endless(request: Any, context: Context) -> AsyncIterator[bytes]:
        nonlocal made
        try:
            while True:
                made += 1
                yield bytes(10_000)
        finally:
            left.set()

    client = await chain(cluster, endless, returned, annotated=False)
    async for _ in client.generate(None, annotated=False):
        before = -1
        while before != made:  # until it makes nothing more
            before = made
            for _ in range(200):
                await asyncio.sleep(0)
        break
    await patiently(left.wait())
    assert made * 10_000 < 16 << 20
