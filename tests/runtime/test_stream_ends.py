"""A stream that was cut never ends like a whole one, whoever cut it and however it is read afterwards."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from tests.runtime.cluster import Cluster, drained, patiently, turns, until
from triton_distributed.errors import RemoteError, RequestIncomplete, StreamClosed, StreamIncomplete
from triton_distributed.runtime import Context, ResponseStream


async def five(request: Any) -> AsyncIterator[int]:
    for n in range(5):
        yield n


async def endless(request: Any) -> AsyncIterator[int]:
    n = 0
    while True:
        yield n
        n += 1
        await asyncio.sleep(0)


# --- ways to cut a stream: each returns what was read before --------------------------------------------------------


async def by_break(stream: ResponseStream, context: Context) -> None:
    async for _ in stream:
        break


async def by_error_in_the_loop(stream: ResponseStream, context: Context) -> None:
    with pytest.raises(LookupError):
        async for _ in stream:
            raise LookupError


async def by_break_when_all_has_arrived(stream: ResponseStream, context: Context) -> None:
    await anext(stream)
    await turns(50)
    async for _ in stream:
        break


async def by_aclose(stream: ResponseStream, context: Context) -> None:
    await anext(stream)
    await stream.aclose()


async def by_aclose_before_it_was_read(stream: ResponseStream, context: Context) -> None:
    await stream.aclose()


async def by_aclose_of_another_task(stream: ResponseStream, context: Context) -> None:
    await anext(stream)
    await asyncio.create_task(stream.aclose())


async def by_cancelled_reader(stream: ResponseStream, context: Context) -> None:
    got = asyncio.Event()

    async def reads() -> None:
        async for _ in stream:
            got.set()
            await asyncio.Event().wait()

    reading = asyncio.create_task(reads())
    await got.wait()
    reading.cancel()
    await asyncio.wait([reading])


async def by_cancel_that_was_told(stream: ResponseStream, context: Context) -> None:
    await anext(stream)
    stream.cancel()
    with pytest.raises(asyncio.CancelledError):
        await anext(stream)


async def by_kill_that_was_told(stream: ResponseStream, context: Context) -> None:
    await anext(stream)
    context.kill()
    with pytest.raises(asyncio.CancelledError):
        await anext(stream)


CUTS: list[Callable[[ResponseStream, Context], Awaitable[None]]] = [
    by_break,
    by_error_in_the_loop,
    by_break_when_all_has_arrived,
    by_aclose,
    by_aclose_before_it_was_read,
    by_aclose_of_another_task,
    by_cancelled_reader,
    by_cancel_that_was_told,
    by_kill_that_was_told,
]


NEED_AN_OPEN_ONE = (by_cancel_that_was_told, by_kill_that_was_told)


async def again_by_async_for(stream: ResponseStream) -> Any:
    return await drained(stream)


async def again_by_anext(stream: ResponseStream) -> Any:
    return await anext(stream)


async def again_in_another_task(stream: ResponseStream) -> Any:
    return await asyncio.create_task(drained(stream))


AGAIN = [again_by_async_for, again_by_anext, again_in_another_task]


@pytest.mark.any_loop
@pytest.mark.parametrize("again", AGAIN)
@pytest.mark.parametrize(
    ("handler", "cut"), [(endless, cut) for cut in CUTS] + [(five, cut) for cut in CUTS if cut not in NEED_AN_OPEN_ONE]
)
async def test_a_cut_stream_does_not_end_like_a_whole_one(handler: Any, cut: Any, again: Any, cluster: Cluster) -> None:
    client = await cluster.connect(handler)
    context = Context()
    stream = client.generate(1, annotated=False, context=context)
    await patiently(cut(stream, context))
    for _ in range(2):  # each time, not only once
        with pytest.raises(StreamClosed) as caught:
            await patiently(again(stream))
    assert isinstance(caught.value, StreamIncomplete)
    assert "before its end" in str(caught.value)


async def test_the_text_says_what_cut_it(cluster: Cluster) -> None:
    client = await cluster.connect(endless)
    stream = client.generate(1, annotated=False)
    await patiently(anext(stream))
    await stream.aclose()
    with pytest.raises(
        StreamClosed, match=r'endpoint "t/components/c/e" ended here after 1 item.*aclose\(\) was called'
    ):
        await patiently(anext(stream))
    stream = client.generate(1, annotated=False)
    await patiently(by_break(stream, Context()))
    with pytest.raises(StreamClosed, match="`async for` was left"):
        await patiently(anext(stream))


async def test_a_stream_that_was_read_to_its_end_is_not_read_again_as_an_empty_one(cluster: Cluster) -> None:
    client = await cluster.connect(five)
    stream = client.generate(1, annotated=False)
    assert await patiently(drained(stream)) == [0, 1, 2, 3, 4]
    with pytest.raises(RuntimeError, match=r"already read to its end \(5 items\)"):
        await patiently(drained(stream))
    with pytest.raises(StopAsyncIteration):  # an iterator that has ended stays so
        await patiently(anext(stream))


async def test_leaving_after_the_last_item_is_no_cut(cluster: Cluster) -> None:
    client = await cluster.connect(five)
    stream = client.generate(1, annotated=False)
    async for n in stream:
        if n == 4:
            await until(lambda: client.stats.inflight == 0)
            break
    with pytest.raises(StopAsyncIteration):
        await patiently(anext(stream))
    with pytest.raises(RuntimeError, match="already read to its end"):
        await patiently(drained(stream))


async def test_an_empty_answer_that_was_looked_at_may_be_iterated_over(cluster: Cluster) -> None:
    async def nothing(request: Any) -> AsyncIterator[int]:
        for n in range(0):
            yield n

    client = await cluster.connect(nothing)
    stream = client.generate(1, annotated=False)
    assert await patiently(anext(stream, None)) is None
    assert await patiently(drained(stream)) == []


async def test_a_failed_stream_does_not_end_like_a_whole_one_when_it_is_iterated_again(cluster: Cluster) -> None:
    async def fails(request: Any) -> AsyncIterator[int]:
        yield 1
        raise KeyError("once")

    client = await cluster.connect(fails)
    stream = client.generate(1, annotated=False)
    with pytest.raises(KeyError):
        await patiently(drained(stream))
    with pytest.raises(StreamClosed, match="failed before with RemoteError: KeyError"):
        await patiently(drained(stream))


async def test_aclose_refuses_while_another_task_reads(cluster: Cluster) -> None:
    async def waits(request: Any) -> AsyncIterator[int]:
        yield 1
        await asyncio.Event().wait()

    client = await cluster.connect(waits)
    stream = client.generate(1, annotated=False)
    items: list[int] = []

    async def reads() -> None:
        async for item in stream:
            items.append(item)

    reading = asyncio.create_task(reads())
    await until(lambda: items)
    await turns()
    with pytest.raises(RuntimeError, match="another task is reading this stream"):
        await stream.aclose()
    assert not reading.done()
    stream.cancel()
    with pytest.raises(asyncio.CancelledError):
        await patiently(reading)


async def test_aclose_refuses_while_another_task_waits_for_the_request_to_be_sent(cluster: Cluster) -> None:
    client = await cluster.connect(five)
    stream = client.generate("large" * 500_000, annotated=False)
    reading = asyncio.create_task(drained(stream))
    await asyncio.sleep(0)
    with pytest.raises(RuntimeError, match="another task is reading this stream"):
        await stream.aclose()
    assert await patiently(reading) == [0, 1, 2, 3, 4]


async def test_an_error_of_the_handlers_own_calls_keeps_its_count(cluster: Cluster) -> None:
    """The handler lets a StreamIncomplete of its own call through: its fields are the handler's, not the caller's."""

    async def fails(request: Any) -> AsyncIterator[int]:
        yield 1
        yield 2
        raise StreamIncomplete("x", 7, "unix:///s", "lost", 41)

    client = await cluster.connect(fails)
    with pytest.raises(StreamIncomplete) as caught:
        await patiently(drained(client.generate(1, annotated=False)))
    assert isinstance(caught.value, RemoteError)
    assert caught.value.items == 41


async def test_requests_that_break_off_do_not_end_like_whole_ones(cluster: Cluster) -> None:
    """The handler has caught its cancellation and reads on."""
    seen: list[Any] = []
    ended = asyncio.Event()

    async def handler(request: AsyncIterator[int]) -> AsyncIterator[int]:
        try:
            while True:
                try:
                    seen.append(await anext(request))
                    yield seen[-1]
                except asyncio.CancelledError:
                    seen.append("cancelled")
                    break
            # The generator of requests was ended by the cancellation; a new look at it must not find a clean end.
            seen.append([each async for each in request])
        except BaseException as error:
            seen.append(error)
            raise
        finally:
            ended.set()

    async def requests() -> AsyncIterator[int]:
        yield 1
        await asyncio.Event().wait()

    client = await cluster.connect(handler)
    stream = client.generate(requests(), annotated=False)
    assert await patiently(anext(stream)) == 1
    stream.cancel()
    await patiently(ended.wait())
    assert seen[:2] == [1, "cancelled"]
    assert isinstance(seen[2], RequestIncomplete)
    assert "after 1 item" in str(seen[2])
