"""A cancellation and a deadline cut what is under way; the calls that a handler's clean-up makes afterwards run."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import pytest

from tests.runtime.cluster import Cluster, patiently, turns, until
from tests.timing import MS
from triton_distributed.runtime import Client, Context, DistributedRuntime

Gives = Callable[[Client, Context], Awaitable[Any]]


async def plainly(release: Client, context: Context) -> Any:
    return await release.call("slot")


async def with_the_handlers_context(release: Client, context: Context) -> Any:
    return await release.call("slot", context=context)


async def with_a_context_of_its_own(release: Client, context: Context) -> Any:
    return await release.call("slot", context=Context())


async def shielded(release: Client, context: Context) -> Any:
    return await asyncio.shield(release.call("slot"))


async def in_a_task(release: Client, context: Context) -> Any:
    return await asyncio.create_task(release.call("slot"))


async def as_a_stream(release: Client, context: Context) -> Any:
    return [item async for item in release.generate("slot", annotated=False)]


async def with_a_timeout(release: Client, context: Context) -> Any:
    return await release.call("slot", timeout=60)


async def one_after_another(release: Client, context: Context) -> Any:
    for _ in range(3):
        await release.call("other")
    return await release.call("slot")


WAYS: list[Gives] = [
    plainly,
    with_the_handlers_context,
    with_a_context_of_its_own,
    shielded,
    in_a_task,
    as_a_stream,
    with_a_timeout,
    one_after_another,
]


class Parts:
    """An endpoint that takes slots back (and never answers "never"), and handlers that hold one until they are cut.

    Attributes:
        given: what was given back.
        problems: what a clean-up saw in place of success.
    """

    def __init__(self, cluster: Cluster, gives: Gives) -> None:
        self._cluster = cluster
        self._gives = gives
        self.given: list[Any] = []
        self.stopped_at_birth: list[bool] = []
        self.problems: list[str] = []
        self.began = asyncio.Event()
        self.done = asyncio.Event()
        self.release: Client

    async def start(self) -> DistributedRuntime:
        await self._cluster.worker(self._release, "t.c.release")
        worker = self._cluster.runtime()
        self.release = await worker.endpoint("t.c.release").client()
        await patiently(self.release.wait_for_instances())
        return worker

    async def _release(self, request: Any, context: Context) -> str:
        if request == "never":
            await asyncio.Event().wait()
        self.stopped_at_birth.append(context.is_stopped())
        await asyncio.sleep(0)
        self.given.append(request)
        return "ok"

    async def _give_back(self, context: Context) -> None:
        try:
            await self._gives(self.release, context)
        except BaseException as error:
            self.problems.append(f"{type(error).__name__}: {error}")
            raise
        finally:
            self.done.set()

    async def waits(self, request: Any, context: Context) -> AsyncIterator[int]:
        """Is cut at an await of its own."""
        try:
            yield 1
            self.began.set()
            await asyncio.Event().wait()
        finally:
            await self._give_back(context)

    async def yields(self, request: Any, context: Context) -> AsyncIterator[str]:
        """Is cut at a yield."""
        try:
            self.began.set()
            while True:
                yield "x" * 1000
        finally:
            await self._give_back(context)

    async def calls(self, request: Any, context: Context) -> AsyncIterator[int]:
        """Is cut in a call of its own, which is cut too."""
        try:
            yield 1
            self.began.set()
            await self.release.call("never")
        finally:
            await self._give_back(context)

    async def coroutine(self, request: Any, context: Context) -> int:
        try:
            self.began.set()
            await asyncio.Event().wait()
        finally:
            await self._give_back(context)
        return 1


KINDS = ["waits", "yields", "calls", "coroutine"]


async def left(client: Client, parts: Parts) -> None:
    stream = client.generate(1, annotated=False)
    reading = asyncio.ensure_future(anext(stream))
    await patiently(parts.began.wait())
    reading.cancel()
    await asyncio.wait([reading])
    stream.cancel()


async def out_of_time(client: Client, parts: Parts) -> None:
    with pytest.raises(TimeoutError):
        async for _ in client.generate(1, annotated=False, timeout=50 * MS):
            pass


async def killed(client: Client, parts: Parts) -> None:
    context = Context()
    stream = client.generate(1, annotated=False, context=context)
    await patiently(parts.began.wait())
    context.kill()
    del stream


CUTS = [left, out_of_time, killed]


@pytest.mark.parametrize("gives", WAYS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cut", CUTS)
async def test_clean_up_gives_back_what_it_holds(cut: Any, kind: str, gives: Gives, cluster: Cluster) -> None:
    parts = Parts(cluster, gives)
    worker = await parts.start()
    await cluster.serve(worker, getattr(parts, kind))
    client = await cluster.client()
    await patiently(cut(client, parts))
    if not parts.began.is_set():
        return  # the time was over before the handler began: it holds nothing
    await patiently(parts.done.wait())
    assert parts.problems == []
    assert "slot" in parts.given
    assert not any(parts.stopped_at_birth)


async def test_clean_up_after_a_shutdown_that_cuts(cluster: Cluster) -> None:
    parts = Parts(cluster, plainly)
    worker = await parts.start()
    await cluster.serve(worker, parts.waits, graceful_shutdown=False)
    client = await cluster.client()
    stream = client.generate(1, annotated=False)
    await patiently(parts.began.wait())
    await patiently(worker.close())
    assert parts.given == ["slot"]
    assert parts.problems == []
    stream.cancel()


async def test_clean_up_of_a_plain_generator(cluster: Cluster) -> None:
    parts = Parts(cluster, plainly)
    worker = await parts.start()
    loop = asyncio.get_running_loop()
    done: list[Any] = []

    def handler(request: Any) -> Iterator[str]:
        try:
            loop.call_soon_threadsafe(parts.began.set)
            while True:
                yield "x" * 1000
        finally:
            try:
                done.append(asyncio.run_coroutine_threadsafe(parts.release.call("slot"), loop).result(60))
            except BaseException as error:
                done.append(error)

    await cluster.serve(worker, handler)
    client = await cluster.client()
    for cut in (left, out_of_time):
        parts.began.clear()
        await patiently(cut(client, parts))
        await until(lambda: done)
        assert done == ["ok"]
        done.clear()


async def test_the_calls_that_were_under_way_are_cut(cluster: Cluster) -> None:
    """Clean-up may call; what the handler had called before does not go on."""
    inner_ended = asyncio.Event()
    inner_began = asyncio.Event()
    outcome: list[Any] = []
    done = asyncio.Event()

    async def inner(request: Any) -> AsyncIterator[int]:
        try:
            inner_began.set()
            while True:
                yield 1
                await asyncio.sleep(0)
        finally:
            inner_ended.set()

    async def echo(request: Any) -> Any:
        return request

    await cluster.worker(inner, "t.c.inner")
    await cluster.worker(echo, "t.c.echo")
    calls, echoes = await cluster.client("t.c.inner"), await cluster.client("t.c.echo")

    async def outer(request: Any) -> AsyncIterator[int]:
        try:
            async for item in calls.generate(1, annotated=False):
                yield item
        finally:
            outcome.append(await echoes.call("given back"))
            done.set()

    client = await cluster.connect(outer)
    async for _ in client.generate(1):
        await patiently(inner_began.wait())
        break
    await patiently(inner_ended.wait())
    await patiently(done.wait())
    assert outcome == ["given back"]
    assert calls.stats.inflight == 0


async def test_clean_up_has_a_grace_and_not_for_ever(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("triton_distributed.serving.handler_context.CLEANUP_S", 50 * MS)
    seen: list[Any] = []
    done = asyncio.Event()

    async def never(request: Any, context: Context) -> None:
        seen.append(context.remaining_s())
        await asyncio.Event().wait()

    await cluster.worker(never, "t.c.never")
    calls = await cluster.client("t.c.never")

    async def handler(request: Any) -> AsyncIterator[int]:
        try:
            yield 1
            await asyncio.Event().wait()
        finally:
            with contextlib.suppress(TimeoutError):
                await calls.call(1)
            seen.append("over")
            done.set()

    client = await cluster.connect(handler)
    async for _ in client.generate(1, timeout=3600):
        break
    await patiently(done.wait())
    assert seen[0] is not None
    assert seen[0] <= 50 * MS + 1e-9
    assert seen[1] == "over"


async def test_the_context_still_tells_that_the_time_is_over(cluster: Cluster) -> None:
    left_s: list[float | None] = []
    began = 0
    done = asyncio.Event()

    async def handler(request: Any, context: Context) -> AsyncIterator[int]:
        nonlocal began
        began += 1
        try:
            yield 1
            await asyncio.Event().wait()
        finally:
            left_s.append(context.remaining_s())
            done.set()

    client = await cluster.connect(handler)
    timeout = 50 * MS
    while not began:  # on a busy machine the time may be over before the request arrives
        with pytest.raises(TimeoutError):
            async for _ in client.generate(1, timeout=timeout):
                await turns()
        timeout *= 2
    await patiently(done.wait())
    # The caller's CANCEL may come just before the worker's own deadline. The time of the clean-up does not count here.
    (left,) = left_s
    assert left is not None
    assert left < timeout / 2 + 1e-9
