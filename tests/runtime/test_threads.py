"""Handlers written with plain `def`: in threads, bounded, and never in the loop's way."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from typing import Any

import pytest

from tests.runtime.cluster import Cluster, drained, into, patiently, turns, until
from tests.timing import PATIENCE_S, ROUNDED_S
from triton_distributed.runtime import Context
from triton_distributed.serving import threads
from triton_distributed.serving.plain import PlainHandler, Ready
from triton_distributed.serving.threads import Computation, HandlerThreads


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


class Work(Computation):
    """Calls a function in the pool.

    Attributes:
        ended: set when it has, and its thread is free.
        pauses: whether it parks when it is told to, until `go_on`.
    """

    def __init__(self, function: Callable[[], object] = lambda: None, name: str = "work") -> None:
        super().__init__(name)
        self.function = function
        self.ended = threading.Event()
        self.pauses = True

    def run(self) -> None:
        self.function()

    def must_wait(self) -> bool:
        return self.pauses

    def stop(self) -> None:
        self.pauses = False

    def left(self) -> None:
        self.ended.set()


@pytest.fixture
def pool() -> Iterator[Callable[[int], HandlerThreads]]:
    made: list[HandlerThreads] = []

    def make(most: int) -> HandlerThreads:
        made.append(HandlerThreads(most))
        return made[-1]

    yield make
    for each in made:
        each.close()


async def ended(works: Iterable[Work]) -> None:
    for each in works:
        await until(each.ended.is_set)


async def test_so_many_run_at_once_also_after_there_were_more(pool: Callable[[int], HandlerThreads]) -> None:
    """Work that waited for a thread is not counted as a thread that is free."""
    two = pool(2)
    for _ in range(20):
        works = [Work() for _ in range(20)]
        for each in works:
            two.submit(each)
        await ended(works)
    together = threading.Barrier(2)
    works = [Work(lambda: together.wait(PATIENCE_S)) for _ in range(2)]
    for each in works:
        two.submit(each)
    await ended(works)
    assert len(handler_threads()) == 2
    two.close()
    with pytest.raises(RuntimeError, match="shut down"):
        two.submit(Work())


async def test_a_place_goes_to_those_who_wait_in_order_of_arrival(pool: Callable[[int], HandlerThreads]) -> None:
    """One that has parked takes its place again behind those that came before, and before those that came later."""
    one = pool(1)
    order: list[str] = []
    release, began = threading.Event(), threading.Event()

    def parks() -> None:
        order.append("first")
        one.park(first)
        order.append("first again")

    def blocks() -> None:
        order.append("second")
        began.set()
        release.wait(PATIENCE_S)

    first, second = Work(parks), Work(blocks)
    third, fourth = Work(lambda: order.append("third")), Work(lambda: order.append("fourth"))
    one.submit(first)
    one.submit(second)  # begins as soon as the first parks
    await until(began.is_set)
    one.submit(third)
    one.go_on(first)  # it must still wait
    assert first in one._parked
    first.pauses = False
    one.go_on(first)
    one.submit(fourth)
    release.set()
    await ended([first, second, third, fourth])
    assert order == ["first", "second", "third", "first again", "fourth"]


async def test_work_that_has_not_begun_is_taken_back(pool: Callable[[int], HandlerThreads]) -> None:
    one = pool(1)
    release = threading.Event()
    ran: list[int] = []
    blocks, taken, kept = (
        Work(lambda: release.wait(PATIENCE_S)),
        Work(lambda: ran.append(1)),
        Work(lambda: ran.append(2)),
    )
    for each in (blocks, taken, kept):
        one.submit(each)
    assert one.withdraw(taken)
    assert not one.withdraw(taken)
    assert not one.withdraw(blocks)
    release.set()
    await ended([blocks, kept])
    assert not one.withdraw(kept)
    assert ran == [2]


async def test_threads_that_are_not_needed_end(pool: Callable[[int], HandlerThreads]) -> None:
    """Twenty that park at once have twenty threads; afterwards no more are left than run at once."""
    two = pool(2)
    works: list[Work] = []
    for _ in range(20):
        work = Work()
        work.function = functools.partial(two.park, work)
        works.append(work)
        two.submit(work)
    await until(lambda: len(two._parked) == 20)
    assert len(handler_threads()) == 20
    for each in works:
        each.pauses = False
        two.go_on(each)
    await ended(works)
    await until(lambda: len(handler_threads()) == 2)


async def test_work_waits_where_no_more_threads_may_be_made(
    pool: Callable[[int], HandlerThreads], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads, "MOST_PARKED", 3)
    one = pool(1)
    parking: list[Work] = []
    for _ in range(4):  # one more has a thread, as it runs until it parks
        work = Work()
        work.function = functools.partial(one.park, work)
        parking.append(work)
        one.submit(work)
    await until(lambda: len(one._parked) == 4)
    order: list[int] = []
    waiting = [Work(functools.partial(order.append, n)) for n in range(3)]
    for each in waiting:
        one.submit(each)
    assert one.withdraw(waiting[1])
    await turns()
    assert order == []
    assert len(handler_threads()) == 4
    parking[0].pauses = False
    one.go_on(parking[0])  # those that have threads go on: the places are free
    await ended([parking[0], waiting[0], waiting[2]])
    assert order == [0, 2]
    assert len(handler_threads()) <= 4


async def test_work_that_gets_no_thread_waits_for_one(
    pool: Callable[[int], HandlerThreads], monkeypatch: pytest.MonkeyPatch
) -> None:
    many = pool(8)
    release = threading.Event()
    blocks, waits = Work(lambda: release.wait(PATIENCE_S)), Work()
    many.submit(blocks)

    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        many.submit(waits)
    await turns()
    assert not waits.ended.is_set()
    release.set()
    await ended([blocks, waits])


async def test_what_has_parked_is_stopped_with_the_pool(pool: Callable[[int], HandlerThreads]) -> None:
    one = pool(1)
    works: list[Work] = []
    for _ in range(5):
        work = Work()
        work.function = functools.partial(one.park, work)
        works.append(work)
        one.submit(work)
    await until(lambda: len(one._parked) == 5)
    one.close()
    await ended(works)
    await until(lambda: not handler_threads())


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


class Looked(Ready):
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


def plain(pool: HandlerThreads, function: Callable[..., Any], *arguments: Any) -> PlainHandler:
    return PlainHandler(pool, "plain", function, arguments, Context(), contextvars.copy_context(), None)


@pytest.mark.parametrize("looks", range(4))
@pytest.mark.parametrize("ends", ["raises", "returns"])
async def test_what_a_thread_appends_at_any_moment_is_not_lost(
    ends: str, looks: int, pool: Callable[[int], HandlerThreads]
) -> None:
    """The loop looks whether there are items, and whether the thread is done; it may append and end between any two."""
    go = threading.Event()

    def produce() -> Iterator[int]:
        assert go.wait(PATIENCE_S)
        yield 1
        if ends == "raises":
            raise ValueError("behind the item")

    ended = threading.Event()
    items = plain(pool(1), produce)
    looked = items._ready = Looked()
    left = items.left

    def noted() -> None:
        left()
        ended.set()

    items.left = noted  # type: ignore[method-assign]

    def now() -> None:
        """The thread goes on, and is at its end when the loop does."""
        go.set()
        assert ended.wait(PATIENCE_S)

    def at_look(number: int) -> Any:
        return now if number == 0 else lambda: setattr(looked, "meanwhile", at_look(number - 1))

    reading = asyncio.ensure_future(anext(items))
    await until(lambda: items.thread is not None)
    looked.meanwhile = at_look(looks)
    items._wake()
    async with asyncio.timeout(PATIENCE_S):
        while not reading.done():
            await turns(1)
            items._wake()
    assert list(await reading) == [b"\x01"]
    looked.clear()
    with pytest.raises(ValueError if ends == "raises" else StopAsyncIteration):
        await patiently(anext(items))


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


async def test_a_generator_whose_pool_was_closed_is_closed_and_has_no_clean_end(
    pool: Callable[[int], HandlerThreads],
) -> None:
    closed: list[bool] = []

    def endless() -> Iterator[int]:
        try:
            while True:
                yield 1
        except GeneratorExit:
            closed.append(threading.current_thread().name.startswith("trd-handler"))
            raise

    one = pool(1)
    items = plain(one, endless)
    assert len(await patiently(anext(items))) > 0
    await until(lambda: items in one._parked)
    one.close()
    await until(lambda: not handler_threads())
    assert closed == [True]
    items._ready.clear()
    with pytest.raises(RuntimeError, match="shut down"):
        await patiently(anext(items))
    await patiently(items.aclose())


async def test_the_time_that_is_left_is_known_in_a_thread(cluster: Cluster) -> None:
    def handler(request: Any, context: Context) -> float | None:
        return context.remaining_s()

    client = await cluster.connect(handler)
    left = await patiently(client.call(1, timeout=1000))
    assert 0 < left <= 1000 + ROUNDED_S
    assert await patiently(client.call(1)) is None
