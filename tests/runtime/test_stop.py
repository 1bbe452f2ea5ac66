"""How a handler learns that it should end: a stop for one without a context, `interrupt=False`, detached contexts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from tests.runtime.cluster import Cluster, drained, into, patiently, until
from triton_distributed.runtime import Context


class NoContext:
    """Handlers that take no context, and end only if they are cancelled or closed."""

    def __init__(self) -> None:
        self.began = 0
        self.ended = asyncio.Event()

    async def waits(self, request: Any) -> AsyncIterator[int]:
        self.began += 1
        try:
            yield 0
            await asyncio.Event().wait()
        finally:
            self.ended.set()

    async def yields(self, request: Any) -> AsyncIterator[int]:
        self.began += 1
        try:
            while True:
                yield 0
        finally:
            self.ended.set()

    async def answers(self, request: Any) -> None:
        self.began += 1
        try:
            await asyncio.Event().wait()
        finally:
            self.ended.set()

    def plain(self, request: Any) -> Iterator[int]:
        self.began += 1
        loop = self.loop
        try:
            while True:
                yield 0
        finally:
            loop.call_soon_threadsafe(self.ended.set)

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        return self._loop

    def on(self, loop: asyncio.AbstractEventLoop) -> NoContext:
        self._loop = loop
        return self


@pytest.mark.parametrize("kind", ["waits", "yields", "answers", "plain"])
@pytest.mark.parametrize("options", [{}, {"idempotent": True}, {"resume": True}], ids=str)
async def test_a_stop_cancels_a_handler_that_takes_no_context(
    kind: str, options: dict[str, Any], cluster: Cluster
) -> None:
    handlers = NoContext().on(asyncio.get_running_loop())
    for _ in range(2):
        await cluster.worker(getattr(handlers, kind))
    client = await cluster.client()
    context = Context()
    items: list[int] = []
    reading = asyncio.ensure_future(into(items, client.generate(1, annotated=False, context=context, **options)))
    await until(lambda: handlers.began and (items or kind == "answers"))
    context.stop_generating()
    await patiently(reading)  # A clean end.
    await patiently(handlers.ended.wait())
    assert handlers.began == 1


async def test_a_stopped_request_that_waits_never_begins_without_a_context(cluster: Cluster) -> None:
    handlers = NoContext()
    client = await cluster.connect(handlers.waits, max_inflight=1, max_queue=1)
    first = client.generate(1, annotated=False)
    assert await patiently(anext(first)) == 0
    context = Context()
    waiting = client.generate(2, annotated=False, context=context)
    (endpoint,) = cluster.runtimes[0].worker.server.endpoints
    await until(lambda: len(endpoint.gate.queue))
    context.stop_generating()
    await first.aclose()
    assert await patiently(drained(waiting)) == []
    assert handlers.began == 1
    assert cluster.served()[0].running == 0


class Told:
    """A handler that is served with `interrupt=False`."""

    def __init__(self) -> None:
        self.seen: list[Any] = []
        self.go_on = asyncio.Event()
        self.ended = asyncio.Event()

    async def handler(self, request: Any, context: Context) -> AsyncIterator[int]:
        try:
            yield 0
            await self.go_on.wait()
            self.seen.append((context.is_stopped(), context.is_killed()))
            yield 1
            self.seen.append("after the yield")
            yield 2
        except BaseException as error:
            self.seen.append(type(error))
            raise
        finally:
            self.ended.set()


@pytest.mark.parametrize("how", ["leaves", "deadline"])
async def test_a_handler_that_must_not_be_interrupted_is_told(how: str, cluster: Cluster) -> None:
    told = Told()
    worker = await cluster.worker(told.handler, interrupt=False)
    client = await cluster.client()
    (endpoint,) = worker.worker.server.endpoints
    contexts: list[Context] = []

    if how == "leaves":
        stream = client.generate(1, annotated=False)
        assert await patiently(anext(stream)) == 0
        contexts += [each.context for each in endpoint.gate.running]
        await stream.aclose()
    else:
        with pytest.raises(TimeoutError):
            async for _ in client.generate(1, annotated=False, timeout=0.3):
                contexts += [each.context for each in endpoint.gate.running]
    await until(contexts[0].is_stopped)
    assert worker.statistics().endpoints[0].running == 1  # It keeps its place, and a drain waits for it.
    told.go_on.set()
    await patiently(told.ended.wait())
    (stopped, killed), left = told.seen
    assert (stopped, left) == (True, GeneratorExit)
    assert how == "deadline" or not killed  # The caller's own deadline may cancel the request before the worker's does.
    await until(lambda: not endpoint.gate.running)


async def test_a_drain_waits_for_a_handler_that_was_told_and_cancels_it_at_its_end() -> None:
    cluster = Cluster(drain_timeout_s=0.2)
    told = Told()
    try:
        await cluster.worker(told.handler, interrupt=False)
        client = await cluster.client()
        async for _ in client.generate(1):
            break
        assert not told.ended.is_set()
    finally:
        await cluster.close()
    assert told.seen == [asyncio.CancelledError]


async def test_a_call_with_a_detached_context_outlives_its_request(cluster: Cluster) -> None:
    inner_ended: list[str] = []
    go_on = asyncio.Event()

    async def inner(request: Any, context: Context) -> str:
        inner_ended.append(context.id())
        await go_on.wait()
        inner_ended.append(f"{context.remaining_s()} {context.metadata['tenant']}")
        return "done"

    calls: list[asyncio.Task[Any]] = []
    await cluster.worker(inner, "t.c.inner")
    client_of_inner = await cluster.client("t.c.inner")

    async def outer(request: Any, context: Context) -> AsyncIterator[int]:
        calls.append(asyncio.create_task(client_of_inner.call(1, context=context.detached("background"))))
        yield 0
        await asyncio.Event().wait()

    client = await cluster.connect(outer)
    async for _ in client.generate(1, timeout=60, metadata={"tenant": "a"}):
        await until(lambda: inner_ended)
        break
    await until(lambda: cluster.served()[0].running == 0 or cluster.served()[1].running == 0)
    go_on.set()
    assert await patiently(calls[0]) == "done"
    assert inner_ended == ["background", "None a"]


def test_a_detached_context_is_not_stopped_with_the_first_one() -> None:
    context = Context("a", {"tenant": "x"}, {"user": "u"})
    detached = context.detached()
    context.kill()
    assert not detached.is_stopped()
    assert detached.id() != "a"
    assert detached.metadata == {"tenant": "x"}
    assert detached.travelling == {"user": "u"}
    with pytest.raises(TypeError, match="id"):
        context.detached(5)  # type: ignore[arg-type]
