"""`stream.accepted()`: a handler has the request, or what prevented that; and `async with` on a stream."""

from __future__ import annotations

import asyncio
import gc
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.runtime.cluster import Cluster, drained, patiently, turns, until
from tests.runtime.programs import program
from triton_distributed.calling.state import CLOSED, OPEN
from triton_distributed.context import Context
from triton_distributed.errors import (
    DeadlineExceeded,
    Draining,
    InvalidRequest,
    NoInstances,
    Overloaded,
    Paused,
    RemoteError,
    RuntimeClosed,
    StreamClosed,
    StreamIncomplete,
    WrongLoop,
)
from triton_distributed.runtime import ResponseStream, triton_endpoint


class Prompt(msgspec.Struct):
    text: str


class Held:
    """A handler that waits until it may go on, and knows how many wait and how many were cancelled."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.begun = self.cancelled = 0

    async def handler(self, request: Any) -> AsyncIterator[Any]:
        self.begun += 1
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        yield request


@pytest.fixture
def held() -> Held:
    return Held()


async def outcome(stream: ResponseStream) -> type[BaseException] | None:
    try:
        await stream.accepted()
    except Exception as error:
        return type(error)
    return None


async def over(stream: ResponseStream) -> None:
    """Wait until the whole answer has arrived."""
    await until(lambda: stream._call.state > OPEN)


@pytest.mark.any_loop
async def test_150_streams_on_96_places(held: Held, unix: Cluster) -> None:
    for _ in range(3):
        await unix.worker(held.handler, max_inflight=32)
    client = await unix.client()
    await patiently(client.wait_for_instances(3))
    streams = [client.generate(n, annotated=False) for n in range(150)]
    async with asyncio.timeout(60):
        told = await asyncio.gather(*map(outcome, streams))
    assert Counter(told) == {None: 96, Overloaded: 54}
    assert held.begun == 96
    held.go.set()
    accepted = [stream for stream, error in zip(streams, told, strict=True) if error is None]
    assert len(await asyncio.gather(*[patiently(drained(each)) for each in accepted])) == 96


async def test_accepted_returns_before_the_first_item(held: Held, cluster: Cluster) -> None:
    client = await cluster.connect(held.handler)
    stream = client.generate("a", annotated=False)
    await patiently(stream.accepted())
    assert held.begun == 1
    await patiently(stream.accepted())  # The answer is known.
    held.go.set()
    assert await patiently(drained(stream)) == ["a"]
    await patiently(stream.accepted())


async def test_a_request_that_waits_for_a_place_is_not_accepted_yet(held: Held, cluster: Cluster) -> None:
    client = await cluster.connect(held.handler, max_inflight=1, max_queue=1)
    first, second = client.generate(1, annotated=False), client.generate(2, annotated=False)
    await patiently(first.accepted())
    waiting = asyncio.ensure_future(second.accepted())
    await turns()
    assert not waiting.done()
    held.go.set()
    await patiently(waiting)
    assert await patiently(drained(second)) == [2]
    assert await patiently(drained(first)) == [1]


@pytest.mark.parametrize("read", [False, True])
async def test_an_answer_that_is_there_has_been_accepted(read: bool, unix: Cluster) -> None:
    async def handler(request: int) -> AsyncIterator[int]:
        for n in range(request):
            yield n

    client = await unix.connect(handler)
    for count in (0, 1, 3):
        stream = client.generate(count, annotated=False)
        await stream
        if read and count:
            assert await patiently(anext(stream)) == 0
        await over(stream)
        await stream.accepted()
        assert await patiently(drained(stream)) == list(range(1 if read and count else 0, count))
        await stream.accepted()


@pytest.mark.parametrize("kind", ["async", "coroutine", "plain", "decorated"])
@pytest.mark.parametrize("bad", [{"text": 5}, 7, "no JSON", '{"text": 5}'])
async def test_an_invalid_request_raises_here(kind: str, bad: Any, cluster: Cluster) -> None:
    async def items(request: Prompt) -> AsyncIterator[str]:
        yield request.text

    async def coroutine(request: Prompt) -> str:
        return request.text

    def plain(request: Prompt) -> str:
        return request.text

    @triton_endpoint(Prompt, str)
    async def decorated(request: Prompt) -> AsyncIterator[str]:
        yield request.text

    handlers: dict[str, Any] = {"async": items, "coroutine": coroutine, "plain": plain, "decorated": decorated}
    client = await cluster.connect(handlers[kind])
    stream = client.generate(bad)
    with pytest.raises(InvalidRequest, match="Invalid request"):
        await patiently(stream.accepted())
    with pytest.raises(StreamClosed, match="it failed before with InvalidRequest"):
        await patiently(drained(stream))
    with pytest.raises(StreamClosed):
        await stream.accepted()


async def test_a_handlers_own_error_comes_from_iteration(unix: Cluster) -> None:
    async def handler(request: Any) -> AsyncIterator[Any]:
        if request == "invalid":
            raise InvalidRequest("", "of another call")  # An error of the handler, not of this request.
        if request:
            raise LookupError("mine")
        yield

    client = await unix.connect(handler)
    for request, kind in (("a", LookupError), ("invalid", InvalidRequest)):
        for early in (True, False):
            stream = client.generate(request)
            await stream
            if not early:
                await over(stream)
            await patiently(stream.accepted())
            with pytest.raises(RemoteError) as caught:
                await patiently(drained(stream))
            assert isinstance(caught.value, kind)


async def test_no_instance(cluster: Cluster) -> None:
    client = await cluster.caller.endpoint("t.c.e").client()
    stream = client.generate(1)
    with pytest.raises(NoInstances):
        await patiently(stream.accepted())


async def test_refusals_of_a_pausing_and_of_a_draining_worker(held: Held, unix: Cluster) -> None:
    worker = await unix.worker(held.handler, max_inflight=1, max_queue=1)
    client = await unix.client()
    running = client.generate(1, annotated=False)
    await patiently(running.accepted())
    waiting = client.generate(2)
    await waiting
    told = asyncio.ensure_future(waiting.accepted())
    await until(lambda: worker.statistics().endpoints[0].waiting == 1)
    await worker.endpoint("t.c.e").pause()
    with pytest.raises((Paused, NoInstances)):
        await patiently(told)
    await worker.endpoint("t.c.e").resume()
    await patiently(client.wait_for_instances())
    waiting = client.generate(3)
    told = asyncio.ensure_future(waiting.accepted())
    await until(lambda: worker.statistics().endpoints[0].waiting == 1)
    worker.shutdown()
    with pytest.raises(Draining):
        await patiently(told)
    held.go.set()
    assert await patiently(drained(running)) == [1]


async def test_a_refused_request_is_accepted_by_another_instance(held: Held, unix: Cluster) -> None:
    await unix.worker(held.handler, max_inflight=1)
    await unix.worker(held.handler, max_inflight=1)
    client = await unix.client()
    await patiently(client.wait_for_instances(2))
    first = client.generate(1)
    await patiently(first.accepted())
    assert first.instance_id is not None
    # The policy goes to the busy one first, so the request is refused, and then accepted elsewhere.
    second = client.generate(2, policy=lambda _, instances, load: max(instances, key=lambda each: load[each.id]))
    await patiently(second.accepted())
    assert second.instance_id != first.instance_id
    held.go.set()


WORKER = """
import asyncio
from triton_distributed.runtime import DistributedRuntime, triton_worker

async def handler(request):
    await asyncio.Event().wait()

@triton_worker()
async def main(runtime: DistributedRuntime):
    await runtime.endpoint("t.c.e").serve_endpoint(handler, max_inflight=1, max_queue=1)

asyncio.run(main())
"""


@pytest.mark.leaves("socket files", reason="a killed worker cannot clean up")
async def test_a_worker_that_dies_before_it_accepts(trd_dir: Path, unix: Cluster) -> None:
    client = await unix.caller.endpoint("t.c.e").client()
    async with program(trd_dir, WORKER) as worker:
        await patiently(client.wait_for_instances())
        running, waiting = client.generate(1), client.generate(2)
        await patiently(running.accepted())
        told = asyncio.ensure_future(waiting.accepted())
        await turns()
        assert not told.done()
        worker.process.kill()
        with pytest.raises((ConnectionError, NoInstances)):
            await patiently(told)
        await running.accepted()
        with pytest.raises(StreamIncomplete):
            await patiently(drained(running))


async def test_a_runtime_that_closes_ends_the_wait(held: Held, unix: Cluster) -> None:
    client = await unix.connect(held.handler, max_inflight=1, max_queue=1)
    running = client.generate(1)
    await patiently(running.accepted())
    told = asyncio.ensure_future(client.generate(2).accepted())
    waiting = asyncio.ensure_future(client.wait_for_instances(2))
    await unix.caller.close()
    with pytest.raises(RuntimeClosed):
        await patiently(told)
    with pytest.raises(RuntimeClosed):
        await patiently(waiting)


async def test_a_deadline_before_acceptance(held: Held, unix: Cluster) -> None:
    client = await unix.connect(held.handler, max_inflight=1, max_queue=1)
    running = client.generate(1)
    await patiently(running.accepted())
    with pytest.raises(DeadlineExceeded):
        await patiently(client.generate(2, timeout=0.01).accepted())
    stream = client.generate(3, timeout=0)
    with pytest.raises(DeadlineExceeded):
        await patiently(stream.accepted())


async def test_a_large_request_is_asked_about_after_it_was_sent(unix: Cluster) -> None:
    async def handler(request: bytes) -> int:
        return len(request)

    client = await unix.connect(handler)
    stream = client.generate(bytes(5_000_000), annotated=False)
    await patiently(stream.accepted())
    assert await patiently(drained(stream)) == [5_000_000]


async def test_a_stream_of_requests_is_accepted_before_its_first_request(unix: Cluster) -> None:
    more = asyncio.Event()

    async def requests() -> AsyncIterator[int]:
        await more.wait()
        yield 1

    async def handler(requests: AsyncIterator[int]) -> AsyncIterator[int]:
        async for each in requests:
            yield each

    client = await unix.connect(handler)
    stream = client.generate(requests(), annotated=False)
    await patiently(stream.accepted())
    more.set()
    assert await patiently(drained(stream)) == [1]


async def test_a_cancelled_wait_cancels_the_handler(held: Held, unix: Cluster) -> None:
    client = await unix.connect(held.handler, max_inflight=1, max_queue=1)
    running = client.generate(1)
    await patiently(running.accepted())
    waiting = client.generate(2)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await waiting.accepted()
    with pytest.raises(StreamClosed, match="waited for its acceptance was cancelled"):
        await patiently(drained(waiting))
    running.cancel()
    await until(lambda: held.cancelled == 1)
    await running.accepted()  # It was, before.


async def test_cancel_and_close_end_a_wait(held: Held, unix: Cluster) -> None:
    client = await unix.connect(held.handler, max_inflight=1, max_queue=3)
    running = client.generate(1)
    await patiently(running.accepted())
    context = Context()
    cancelled, killed = client.generate(2), client.generate(3, context=context)
    waits = [asyncio.ensure_future(each.accepted()) for each in (cancelled, killed)]
    await turns()
    cancelled.cancel()
    context.kill()
    for each in waits:
        with pytest.raises(asyncio.CancelledError):
            await patiently(each)
    running.cancel()


async def test_a_second_wait_says_so(held: Held, unix: Cluster) -> None:
    client = await unix.connect(held.handler, max_inflight=1, max_queue=1)
    running = client.generate(1, annotated=False)
    await patiently(running.accepted())
    second = client.generate(2, annotated=False)
    waiting = asyncio.ensure_future(second.accepted())
    await turns()
    with pytest.raises(RuntimeError, match="another task"):
        await second.accepted()
    held.go.set()
    await patiently(waiting)
    assert await patiently(drained(second)) == [2]
    assert await patiently(drained(running)) == [1]


async def test_dropping_an_accepted_stream_cancels(held: Held, unix: Cluster) -> None:
    client = await unix.connect(held.handler)
    stream: ResponseStream | None = client.generate(1)
    assert stream is not None
    await patiently(stream.accepted())
    del stream
    gc.collect()
    await until(lambda: held.cancelled == 1)


async def test_the_wait_belongs_to_the_loop_of_its_call(held: Held, unix: Cluster) -> None:
    client = await unix.connect(held.handler)
    stream = client.generate(1)

    def elsewhere() -> None:
        asyncio.run(stream.accepted())

    with pytest.raises(WrongLoop):
        await asyncio.to_thread(elsewhere)
    stream.cancel()


# --- async with ------------------------------------------------------------------------------------------------------


async def test_leaving_the_block_cancels_the_handler(held: Held, unix: Cluster) -> None:
    client = await unix.connect(held.handler)
    async with client.generate(1) as stream:
        await patiently(stream.accepted())
        assert isinstance(stream, ResponseStream)
    await until(lambda: held.cancelled == 1)
    with pytest.raises(StreamClosed, match="`async with` was left"):
        await patiently(drained(stream))


async def test_an_error_in_the_block_passes_and_cancels(held: Held, unix: Cluster) -> None:
    client = await unix.connect(held.handler)
    with pytest.raises(LookupError, match="mine"):
        async with client.generate(1) as stream:
            await patiently(stream.accepted())
            raise LookupError("mine")
    await until(lambda: held.cancelled == 1)


async def test_a_whole_stream_in_a_block(unix: Cluster) -> None:
    async def handler(request: int) -> AsyncIterator[int]:
        for n in range(request):
            yield n

    client = await unix.connect(handler)
    async with await client.generate(3, annotated=False) as stream:
        assert await patiently(drained(stream)) == [0, 1, 2]
    assert stream._call.state != CLOSED


async def test_leaving_the_block_ends_another_tasks_read(held: Held, unix: Cluster) -> None:
    client = await unix.connect(held.handler)
    async with client.generate(1) as stream:
        await patiently(stream.accepted())
        reading = asyncio.ensure_future(drained(stream))
        await turns()
    with pytest.raises(StreamIncomplete):
        await patiently(reading)
    await until(lambda: held.cancelled == 1)
