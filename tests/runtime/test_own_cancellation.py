"""A CancelledError that a handler lets out: the runtime's own, the answer to a stop, or the handler's error."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from tests.runtime.cluster import Cluster, drained, into, patiently, turns, until
from triton_distributed.calling.resume import REFILL_S, Resumption
from triton_distributed.errors import Draining, NotUnary, RemoteError, StreamIncomplete
from triton_distributed.runtime import Context


class Counted:
    """Handlers that count how often they began."""

    def __init__(self) -> None:
        self.began = 0

    async def raises(self, request: Any) -> AsyncIterator[int]:
        self.began += 1
        raise asyncio.CancelledError
        yield 1  # type: ignore[unreachable]

    async def raises_after_an_item(self, request: Any, context: Context) -> AsyncIterator[int]:
        self.began += 1
        context.checkpoint(0)
        yield 0
        raise asyncio.CancelledError("mine")

    async def returns(self, request: Any) -> int:
        self.began += 1
        raise asyncio.CancelledError

    async def awaits_what_was_cancelled(self, request: Any) -> int:
        self.began += 1
        inner = asyncio.ensure_future(asyncio.sleep(3600))
        asyncio.get_running_loop().call_soon(inner.cancel)
        await inner
        return 1

    async def cancels_itself(self, request: Any) -> int:
        self.began += 1
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        await asyncio.sleep(0)
        return 1

    async def cancels_its_call(self, request: Any) -> AsyncIterator[int]:
        self.began += 1
        context = Context()
        context.kill()
        yield await request_of_nobody(context)

    def plainly(self, request: Any) -> int:
        self.began += 1
        raise asyncio.CancelledError

    def plain_generator(self, request: Any) -> Iterator[int]:
        self.began += 1
        yield 1
        raise asyncio.CancelledError


async def request_of_nobody(context: Context) -> int:
    raise asyncio.CancelledError("as a call with a killed context does")


OWN = [
    "raises",
    "raises_after_an_item",
    "returns",
    "awaits_what_was_cancelled",
    "cancels_itself",
    "cancels_its_call",
    "plainly",
    "plain_generator",
]


@pytest.mark.any_loop
@pytest.mark.parametrize("options", [{}, {"idempotent": True}, {"resume": True}], ids=str)
@pytest.mark.parametrize("kind", OWN)
async def test_it_is_the_handlers_error_and_begins_nowhere_else(
    kind: str, options: dict[str, Any], cluster: Cluster
) -> None:
    handlers = Counted()
    for _ in range(3):
        await cluster.worker(getattr(handlers, kind))
    client = await cluster.client()
    await until(lambda: len(client.instance_ids()) == 3)
    with pytest.raises(RemoteError) as caught:
        await patiently(drained(client.generate(1, annotated=False, **options)))
    assert caught.value.type_name == "CancelledError"
    assert not isinstance(caught.value, asyncio.CancelledError)
    assert not isinstance(caught.value, StreamIncomplete)
    assert "CancelledError" in caught.value.remote_traceback
    assert handlers.began == 1


async def test_it_does_not_harm_the_worker(cluster: Cluster) -> None:
    handlers = Counted()
    worker = await cluster.worker(handlers.raises, max_inflight=1, max_queue=0)
    client = await cluster.client()
    for _ in range(20):
        with pytest.raises(RemoteError):
            await patiently(drained(client.generate(1)))
    assert worker.stats()["t/components/c/e"].inflight == 0
    assert client.instance_ids() == [worker.instance_id]


class Obeys:
    """Handlers that obey a stop by raising CancelledError."""

    def __init__(self) -> None:
        self.began = 0

    async def before_an_item(self, request: Any, context: Context) -> AsyncIterator[int]:
        self.began += 1
        await context.stopped()
        raise asyncio.CancelledError
        yield 1  # type: ignore[unreachable]

    async def after_items(self, request: Any, context: Context) -> AsyncIterator[int]:
        self.began += 1
        n = 0
        while not context.is_stopped():
            context.checkpoint(n)
            yield n
            n += 1
            await asyncio.sleep(0)
        raise asyncio.CancelledError

    def plain_generator(self, request: Any, context: Context) -> Iterator[int]:
        self.began += 1
        n = 0
        while not context.is_stopped():
            yield n
            n += 1
        raise asyncio.CancelledError


@pytest.mark.any_loop
@pytest.mark.parametrize("options", [{}, {"idempotent": True}, {"resume": True}], ids=str)
@pytest.mark.parametrize("kind", ["before_an_item", "after_items", "plain_generator"])
async def test_a_stop_that_is_obeyed_by_raising_is_a_clean_end(
    kind: str, options: dict[str, Any], cluster: Cluster
) -> None:
    handlers = Obeys()
    for _ in range(3):
        await cluster.worker(getattr(handlers, kind))
    client = await cluster.client()
    await until(lambda: len(client.instance_ids()) == 3)
    context = Context()
    stream = client.generate(1, annotated=False, context=context, **options)
    items: list[int] = []
    reading = asyncio.ensure_future(into(items, stream))
    await until(lambda: handlers.began and (items or kind == "before_an_item"))
    context.stop_generating()
    await patiently(reading)
    assert items == list(range(len(items)))
    assert handlers.began == 1


async def test_a_stopped_call_has_no_answer(cluster: Cluster) -> None:
    handlers = Obeys()
    client = await cluster.connect(handlers.before_an_item)
    context = Context()
    calling = asyncio.ensure_future(client.call(1, context=context, idempotent=True))
    await until(lambda: handlers.began)
    context.stop_generating()
    with pytest.raises(NotUnary, match="no item"):
        await patiently(calling)


@pytest.mark.parametrize("options", [{"idempotent": True}, {"resume": True}], ids=str)
async def test_a_stopped_call_whose_worker_is_lost_is_not_sent_again(options: dict[str, Any], cluster: Cluster) -> None:
    began: list[int] = []

    async def ignores(request: Any, context: Context) -> AsyncIterator[int]:
        began.append(1)
        await asyncio.Event().wait()
        yield 1

    workers = [await cluster.worker(ignores, graceful_shutdown=False) for _ in range(3)]
    client = await cluster.client()
    await until(lambda: len(client.instance_ids()) == 3)
    context = Context()
    stream = client.generate(1, annotated=False, context=context, **options)
    reading = asyncio.ensure_future(drained(stream))
    await until(lambda: began)
    context.stop_generating()
    await turns()
    [asked] = [each for each in workers if each.instance_id == stream.instance_id]
    await patiently(asked.close())
    with pytest.raises(StreamIncomplete, match="asked the handler to stop"):
        await patiently(reading)
    assert len(began) == 1


async def test_a_stopped_call_that_is_refused_is_not_sent_elsewhere(cluster: Cluster) -> None:
    """The request waits for a place when it is stopped, and then its worker begins to drain."""
    began: list[str] = []

    async def handler(request: str) -> str:
        began.append(request)
        await asyncio.Event().wait()
        return request

    here, other = [await cluster.worker(handler, max_inflight=1, max_queue=5) for _ in range(2)]
    client = await cluster.client(
        policy=lambda request, instances, load: min(instances, key=lambda e: e.id != here.instance_id)
    )
    await until(lambda: len(client.instance_ids()) == 2)
    first = client.generate("holds the place")
    await until(lambda: began)
    context = Context()
    waiting = client.generate("waits", context=context)
    await until(lambda: client.load[here.instance_id] == 2)
    await turns(50)
    context.stop_generating()
    here.shutdown()
    with pytest.raises(Draining):
        await patiently(drained(waiting))
    assert began == ["holds the place"]
    first.cancel()
    assert other.stats()["t/components/c/e"].inflight == 0


def test_resumptions_are_bounded_whatever_handlers_do() -> None:
    now = 100.0
    resumption = Resumption(3, now)

    def resumed(now: float) -> bool:
        if not resumption.allowed(now):
            return False
        resumption.resume(b"", now)
        return True

    assert [resumed(now) for _ in range(5)] == [True, True, True, False, False]
    # Each item may have brought progress: it changes nothing. Time gives them back one by one.
    assert not resumed(now + REFILL_S / 2)
    assert resumed(now + REFILL_S)
    assert not resumed(now + REFILL_S)
    later = now + 100 * REFILL_S
    assert [resumed(later) for _ in range(4)] == [True, True, True, False]
    assert not Resumption(0, now).allowed(later)


async def test_a_request_that_ends_every_worker_is_resumed_only_so_often(cluster: Cluster) -> None:
    """Each worker answers an item and is gone."""
    began: list[int] = []

    async def fatal(request: Any, context: Context) -> AsyncIterator[int]:
        n = context.resume_token or 0
        began.append(n)
        context.checkpoint(n + 1)
        yield n
        await asyncio.Event().wait()

    workers = [await cluster.worker(fatal, graceful_shutdown=False) for _ in range(8)]
    client = await cluster.client()
    await until(lambda: len(client.instance_ids()) == 8)
    stream = client.generate(1, annotated=False, resume=True)
    items: list[int] = []
    reading = asyncio.ensure_future(into(items, stream))

    def got_so_far(count: int) -> bool:
        return len(items) == count or reading.done()

    for count in range(1, 5):
        await until(functools.partial(got_so_far, count))
        [asked] = [each for each in workers if each.instance_id == stream.instance_id]
        if reading.done():
            break
        await patiently(asked.close())
    with pytest.raises(StreamIncomplete, match="already resumed as often as allowed"):
        await patiently(reading)
    assert items == [0, 1, 2, 3]
    assert len(began) == 4  # the first and TRD_RETRIES more
