"""Handlers written with plain `def`: in threads, bounded, and never in the loop's way."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from tests.runtime.cluster import Cluster, drained, patiently, until
from triton_distributed.runtime import Context
from triton_distributed.runtime.threads import AHEAD, HandlerThreads, ThreadedIterator


@pytest.mark.any_loop
async def test_a_blocking_handler_does_not_block_the_loop(cluster: Cluster) -> None:
    release = threading.Event()

    def blocks(request: Any) -> str:
        return "released" if release.wait(20) else "never"

    async def quick(request: Any) -> Any:
        return request

    worker = await cluster.worker(blocks)
    await cluster.serve(worker, quick, "t.c.quick")
    blocked = asyncio.create_task((await cluster.client()).call(1))
    client = await cluster.client("t.c.quick")
    for n in range(50):
        assert await patiently(client.call(n)) == n
    assert not blocked.done()
    release.set()
    assert await patiently(blocked) == "released"


@pytest.mark.parametrize("kind", ["function", "generator"])
async def test_at_most_so_many_run_at_once(kind: str) -> None:
    cluster = Cluster(threads=3)
    lock = threading.Lock()
    running = most = 0
    full = threading.Event()
    release = threading.Event()

    def work() -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
            if running == 3:
                full.set()
        release.wait(20)
        with lock:
            running -= 1

    def function(request: int) -> int:
        work()
        return request

    def generator(request: int) -> Iterator[int]:
        work()
        yield request

    client = await cluster.connect({"function": function, "generator": generator}[kind])
    calls = [asyncio.create_task(client.call(n)) for n in range(12)]
    await until(full.is_set)
    release.set()
    assert await patiently(asyncio.gather(*calls)) == list(range(12))
    assert most == 3
    assert sum(each.name.startswith("trd-handler") for each in threading.enumerate()) <= 3
    await cluster.close()


@pytest.mark.any_loop
async def test_items_come_as_they_are_produced(cluster: Cluster) -> None:
    steps = [threading.Event() for _ in range(4)]

    def handler(request: Any) -> Iterator[int]:
        for n, step in enumerate(steps):
            assert step.wait(20)
            yield n

    client = await cluster.connect(handler)
    reading = aiter(client.generate(1, annotated=False))
    for n, step in enumerate(steps):
        step.set()
        assert await patiently(anext(reading)) == n
    with pytest.raises(StopAsyncIteration):
        await patiently(anext(reading))


async def test_a_generator_that_is_not_read_stops_and_holds_no_thread() -> None:
    cluster = Cluster(threads=1)
    produced = 0

    def endless(request: Any) -> Iterator[str]:
        nonlocal produced
        while True:
            produced += 1
            yield "x" * 1000

    def quick(request: Any) -> Any:
        return request

    worker = await cluster.worker(endless)
    await cluster.serve(worker, quick, "t.c.quick")
    client, other = await cluster.client(), await cluster.client("t.c.quick")
    stream = client.generate(1, annotated=False)
    await patiently(anext(stream))
    before = -1
    while produced != before:
        before = produced
        for n in range(20):
            assert await patiently(other.call(n)) == n
    assert produced < 2000
    stream.cancel()
    assert await patiently(other.call("after")) == "after"
    await cluster.close()


async def test_items_are_never_lost_or_reordered(cluster: Cluster) -> None:
    def handler(request: int) -> Iterator[int]:
        yield from range(request)

    client = await cluster.connect(handler)
    sizes = [0, 1, 63, 64, 65, 1000, 10_000]
    found = await patiently(asyncio.gather(*[drained(client.generate(n, annotated=False)) for n in sizes]))
    assert [each == list(range(n)) for each, n in zip(found, sizes, strict=True)] == [True] * len(sizes)


async def test_context_variables_reach_the_thread(cluster: Cluster) -> None:
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="none")

    async def outer(request: str) -> AsyncIterator[Any]:
        variable.set(request)
        yield await asyncio.to_thread(variable.get)

    def plain(request: Any) -> str:
        seen = variable.get()
        variable.set(f"set by {request}")
        return seen

    def generator(request: Any) -> Iterator[str]:
        for _ in range(3):
            yield variable.get()
            variable.set(f"set by {request}")

    for name, handler in {"t.c.o": outer, "t.c.p": plain, "t.c.g": generator}.items():
        await cluster.worker(handler, name)
    assert await patiently((await cluster.client("t.c.o")).call("x")) == "x"
    client = await cluster.client("t.c.p")
    assert [await patiently(client.call(n)) for n in range(5)] == ["none"] * 5  # no request sees another's
    client = await cluster.client("t.c.g")
    for n in range(3):
        assert await patiently(drained(client.generate(n, annotated=False))) == ["none", f"set by {n}", f"set by {n}"]


async def test_a_cancelled_function_ends_before_its_slot_is_free(cluster: Cluster) -> None:
    release = threading.Event()
    began = threading.Event()

    def handler(request: Any) -> None:
        began.set()
        release.wait(20)

    worker = await cluster.worker(handler, max_inflight=1)
    client = await cluster.client()
    call = asyncio.create_task(client.call(1))
    await until(began.is_set)
    call.cancel()
    await asyncio.wait([call])
    stats = worker.stats()["t/components/c/e"]
    for _ in range(20):
        await asyncio.sleep(0)
    assert stats.inflight == 1  # a thread cannot be interrupted
    release.set()
    await until(lambda: not stats.inflight)


async def test_closing_waits_for_what_runs_in_threads(cluster: Cluster) -> None:
    release, ended = threading.Event(), threading.Event()

    def handler(request: Any) -> str:
        release.wait(20)
        ended.set()
        return "done"

    worker = await cluster.worker(handler)
    client = await cluster.client()
    call = asyncio.create_task(client.call(1))
    await until(lambda: worker.stats()["t/components/c/e"].inflight)
    closing = asyncio.create_task(worker.close())
    for _ in range(20):
        await asyncio.sleep(0)
    assert not closing.done()
    release.set()
    assert await patiently(call) == "done"
    await patiently(closing)
    assert ended.is_set()


async def test_a_thread_that_could_not_be_started_is_not_counted(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[Any] = []

    def handler(request: Any) -> Any:
        ran.append(request)
        return request

    client = await cluster.connect(handler)
    with monkeypatch.context() as patch:

        def refuse(self: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")

        patch.setattr(threading.Thread, "start", refuse)
        for n in range(40):  # more than the pool has threads
            with pytest.raises(RuntimeError, match="can't start new thread"):
                await patiently(client.call(n))
    assert await patiently(client.call("after")) == "after"
    assert ran == ["after"]


async def test_a_generator_that_raises_stop_async_iteration_has_no_clean_end(cluster: Cluster) -> None:
    def handler(request: Any) -> Iterator[int]:
        yield 1
        raise StopAsyncIteration

    client = await cluster.connect(handler)
    with pytest.raises(RuntimeError, match="StopAsyncIteration"):
        await patiently(drained(client.generate(1)))


async def test_a_generator_whose_pool_was_closed_can_be_closed() -> None:
    pool = HandlerThreads(1)
    items = ThreadedIterator(pool, iter(range(AHEAD + 10)))
    for _ in range(AHEAD):
        await patiently(anext(items))
    await until(lambda: not items._running)
    items._items.clear()
    pool.close()
    with pytest.raises(RuntimeError, match="shut down"):
        await patiently(anext(items))
    with pytest.raises(RuntimeError, match="shut down"):
        await patiently(items.aclose())


async def test_the_time_that_is_left_is_known_in_a_thread(cluster: Cluster) -> None:
    def handler(request: Any, context: Context) -> float | None:
        return context.remaining_s()

    client = await cluster.connect(handler)
    left = await patiently(client.call(1, timeout=1000))
    assert 0 < left <= 1000
    assert await patiently(client.call(1)) is None
