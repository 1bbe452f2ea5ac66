"""Handlers written with plain `def`: in threads, bounded, and never in the loop's way."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections import deque
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from tests.runtime.cluster import Cluster, drained, into, patiently, turns, until
from tests.timing import PATIENCE_S, ROUNDED_S
from triton_distributed.runtime import Context
from triton_distributed.runtime.threads import AHEAD, HandlerThreads, ThreadedIterator


@pytest.mark.any_loop
async def test_a_blocking_handler_does_not_block_the_loop(cluster: Cluster) -> None:
    release = threading.Event()

    def blocks(request: Any) -> str:
        return "released" if release.wait(PATIENCE_S) else "never"

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
        release.wait(PATIENCE_S)
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


def handler_threads() -> list[threading.Thread]:
    return [each for each in threading.enumerate() if each.name.startswith("trd-handler")]


async def test_a_thread_that_is_free_is_used_again() -> None:
    cluster = Cluster(threads=8)

    def handler(request: Any) -> None:
        if request == "fails":
            raise ValueError(request)

    client = await cluster.connect(handler)
    assert handler_threads() == []  # made when first needed
    for _ in range(30):
        assert await patiently(client.call(1)) is None
        with pytest.raises(ValueError, match="fails"):
            await patiently(client.call("fails"))
    assert len(handler_threads()) == 1
    await cluster.close()
    await until(lambda: not handler_threads())


async def test_so_many_run_at_once_also_after_there_were_more() -> None:
    """Work that waited for a thread is not counted as a thread that is free."""
    threads = HandlerThreads(2)
    try:
        for _ in range(20):
            await patiently(asyncio.gather(*(threads.call(sum, (1, 2)) for _ in range(20))))
        together = threading.Barrier(2)
        await patiently(asyncio.gather(*(threads.call(together.wait, PATIENCE_S) for _ in range(2))))
        assert len(handler_threads()) == 2
    finally:
        threads.close()
    with pytest.raises(RuntimeError, match="shut down"):
        await threads.call(sum, ())


@pytest.mark.any_loop
async def test_items_come_as_they_are_produced(cluster: Cluster) -> None:
    steps = [threading.Event() for _ in range(4)]

    def handler(request: Any) -> Iterator[int]:
        for n, step in enumerate(steps):
            assert step.wait(PATIENCE_S)
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


@pytest.mark.parametrize("count", [0, 1, 63, 64, 65, 500])
async def test_an_exception_behind_items_comes_behind_them(count: int, cluster: Cluster) -> None:
    def handler(request: int) -> Iterator[int]:
        yield from range(count)
        raise ValueError("behind the items")

    client = await cluster.connect(handler)
    for _ in range(20):
        items: list[int] = []
        with pytest.raises(ValueError, match="behind the items"):
            await into(items, client.generate(1, annotated=False))
        assert items == list(range(count))


class Looked(deque[Any]):
    """Items that are no more than looked at when a thread appends to them and ends."""

    def __init__(self) -> None:
        super().__init__()
        self.meanwhile: Any = None

    def __len__(self) -> int:
        found = super().__len__()
        if self.meanwhile is not None and not found:
            meanwhile, self.meanwhile = self.meanwhile, None
            meanwhile()
        return found

    def __bool__(self) -> bool:
        return len(self) > 0


@pytest.mark.parametrize("looks", range(4))
@pytest.mark.parametrize("ends", ["raises", "returns"])
async def test_what_a_thread_appends_at_any_moment_is_not_lost(ends: str, looks: int) -> None:
    """The loop looks whether there are items, and whether the thread is done; it may append and end between any two."""
    threads = HandlerThreads(1)
    go = threading.Event()

    def produce() -> Iterator[int]:
        assert go.wait(PATIENCE_S)
        yield 1
        if ends == "raises":
            raise ValueError("behind the item")

    ended = threading.Event()
    items = ThreadedIterator(threads, produce())
    looked = items._items = Looked()
    run = items._run

    def noted() -> None:
        run()
        ended.set()

    items._run = noted  # type: ignore[method-assign]

    def now() -> None:
        """The thread goes on, and is at its end when the loop does."""
        go.set()
        assert ended.wait(PATIENCE_S)

    def at_look(number: int) -> Any:
        return now if number == 0 else lambda: setattr(looked, "meanwhile", at_look(number - 1))

    reading = asyncio.ensure_future(anext(items))
    await until(lambda: items._running)
    looked.meanwhile = at_look(looks)
    items._wake()
    try:
        async with asyncio.timeout(PATIENCE_S):
            while not reading.done():
                await turns(1)
                items._wake()
        assert await reading == 1
        with pytest.raises(ValueError if ends == "raises" else StopAsyncIteration):
            await patiently(anext(items))
    finally:
        threads.close()


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
        release.wait(PATIENCE_S)

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
        release.wait(PATIENCE_S)
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
    assert 0 < left <= 1000 + ROUNDED_S
    assert await patiently(client.call(1)) is None
