"""Recordings: exactly what a handler is asked and answers, within a bound, and no trace of them afterwards."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import numpy as np
import pytest

from tests.runtime.cluster import Cluster, patiently
from tests.runtime.test_inspection import asking
from triton_distributed.payload.codec import decode
from triton_distributed.runtime import Annotated, Context, DistributedRuntime
from triton_distributed.runtime.recording import Exchange, Payload, Recording, is_recorded
from triton_distributed.serving.endpoint import ServedEndpoint

NAME = "t.c.e"


async def asyncgen(request: Any) -> AsyncIterator[Any]:
    yield request
    yield Annotated(request, "step")


async def coroutine(request: Any, context: Context) -> Any:
    return {"got": request, "user": context.travelling.get("user")}


def plain(request: Any) -> Any:
    return request


def generator(request: Any) -> Any:
    yield request
    yield np.arange(40_000)


async def two_way(requests: AsyncIterator[int]) -> AsyncIterator[int]:
    async for each in requests:
        yield each + 1


async def fails(request: Any) -> AsyncIterator[Any]:
    yield 1
    raise KeyError(request)


async def twenty(size: int) -> AsyncIterator[bytes]:
    for _ in range(20):
        yield bytes(size)


async def forever(request: Any) -> AsyncIterator[Any]:
    yield request
    await asyncio.get_running_loop().create_future()


async def served(cluster: Cluster, handler: Any, **options: Any) -> tuple[DistributedRuntime, ServedEndpoint]:
    worker = cluster.runtime()
    await cluster.serve(worker, handler, NAME, **options)
    (endpoint,) = worker.worker.server.endpoints
    return worker, endpoint


async def many(numbers: list[int]) -> AsyncIterator[int]:
    for each in numbers:
        yield each


def values(payloads: list[Payload]) -> list[Any]:
    return [decode(each.body, [bytearray(buffer) for buffer in each.buffers]) for each in payloads]


@pytest.mark.parametrize(
    ("handler", "request_", "items"),
    [
        (asyncgen, {"a": 1}, [{"a": 1}, [{"a": 1}, "step", [], None]]),
        (coroutine, 5, [{"got": 5, "user": "u"}]),
        (plain, "x", ["x"]),
        (generator, b"\x01", [b"\x01", np.arange(40_000)]),
        (two_way, [1, 2], [2, 3]),
    ],
    ids=lambda each: getattr(each, "__name__", ""),
)
async def test_every_kind_of_handler_is_recorded_and_answers_as_before(
    cluster: Cluster, handler: Any, request_: Any, items: list[Any]
) -> None:
    _, endpoint = await served(cluster, handler)
    client = await cluster.client(NAME)
    context = Context("r1", {"secret": "s"}, {"user": "u"})
    sent = many(request_) if handler is two_way else request_
    with Recording(endpoint) as recording:
        answer = [each async for each in client.generate(sent, context=context, annotated=False)]
        exchange = await patiently(anext(recording))
    assert len(answer) == len(items)
    assert (exchange.id, exchange.outcome, exchange.error) == ("r1", "ok", ("", ""))
    assert exchange.streamed is (handler is two_way)
    np.testing.assert_equal(values(exchange.requests), request_ if exchange.streamed else [request_])
    np.testing.assert_equal(values(exchange.items), items)
    assert 0 <= exchange.items[0].after_s <= exchange.items[-1].after_s <= exchange.took_s
    assert exchange.metadata == {}


async def test_metadata_is_recorded_on_demand(cluster: Cluster) -> None:
    _, endpoint = await served(cluster, plain)
    client = await cluster.client(NAME)
    with Recording(endpoint, metadata=True) as recording:
        await client.call(1, context=Context(metadata={"a": 1}, travelling={"user": "u"}))
        exchange = await patiently(anext(recording))
    assert exchange.metadata == {"metadata": {"a": 1}, "travelling": {"user": "u"}}


async def test_an_error_and_a_caller_that_leaves(cluster: Cluster) -> None:
    _, endpoint = await served(cluster, fails)
    client = await cluster.client(NAME)
    with Recording(endpoint) as recording:
        with pytest.raises(KeyError):
            await client.call("k")
        exchange = await patiently(anext(recording))
    assert (exchange.outcome, exchange.error, values(exchange.items)) == ("error", ("KeyError", "'k'"), [1])
    other = cluster.runtime()
    await cluster.serve(other, forever, "t.c.forever")
    (endpoint,) = other.worker.server.endpoints
    stream = (await cluster.client("t.c.forever")).generate(7, annotated=False)
    with Recording(endpoint) as recording:
        assert await anext(stream) == 7
        stream.cancel()
        exchange = await patiently(anext(recording))
    assert (exchange.outcome, exchange.error, values(exchange.items)) == ("left", ("", ""), [7])


async def test_where_a_request_waits_is_still_known(cluster: Cluster) -> None:
    worker, endpoint = await served(cluster, forever)
    client = await cluster.client(NAME)
    with Recording(endpoint):
        stream = client.generate(7)
        await anext(stream)
        (report,) = worker.requests()
        stream.cancel()
    assert report.line.endswith(" in forever")


async def test_requests_beyond_the_bound_are_left_out_and_counted(cluster: Cluster) -> None:
    _, endpoint = await served(cluster, plain)
    client = await cluster.client(NAME)
    with Recording(endpoint, most_bytes=1000) as recording:
        for size in (100, 5000, 100):
            await client.call("x" * size)
        sizes = [len(values((await patiently(anext(recording))).requests)[0]) for _ in range(2)]
        assert (sizes, recording.skipped, recording.held) == ([100, 100], 1, 0)


async def test_an_exchange_that_is_larger_than_a_message_is_left_out_and_the_recording_goes_on() -> None:
    cluster = Cluster(max_message_bytes=1_000_000)
    worker, _ = await served(cluster, twenty)
    inspector = await asking(cluster)
    stream = inspector.direct({"about": "recording", "endpoint": NAME}, worker.instance_id, annotated=False)
    await patiently(anext(stream))
    client = await cluster.client(NAME)
    for size in (60_000, 3):
        assert [len(each) async for each in client.generate(size, annotated=False)] == [size] * 20
    exchange = msgspec.convert(await patiently(anext(stream)), Exchange)
    assert (values(exchange.requests), exchange.skipped) == ([3], 1)
    stream.cancel()
    await cluster.close()


async def test_nothing_of_it_is_left(cluster: Cluster) -> None:
    _, endpoint = await served(cluster, plain)
    before = endpoint.handler
    with Recording(endpoint), pytest.raises(RuntimeError, match="is recorded already"), Recording(endpoint):
        pass
    assert endpoint.handler is before


async def test_a_client_records_a_worker_until_it_leaves(cluster: Cluster) -> None:
    worker, endpoint = await served(cluster, plain)
    inspector = await asking(cluster)
    question = {"about": "recording", "endpoint": NAME}
    stream = inspector.direct(question, worker.instance_id, annotated=False)
    assert await patiently(anext(stream)) == {}
    assert is_recorded(endpoint)
    await (await cluster.client(NAME)).call({"large": b"x" * 100_000})
    exchange = msgspec.convert(await patiently(anext(stream)), Exchange)
    assert values(exchange.requests) == values(exchange.items) == [{"large": b"x" * 100_000}]
    stream.cancel()
    with pytest.raises(LookupError, match=r"does not serve t\.c\.other"):
        await patiently(anext(inspector.direct({**question, "endpoint": "t.c.other"}, worker.instance_id)))
    assert not is_recorded(endpoint)
