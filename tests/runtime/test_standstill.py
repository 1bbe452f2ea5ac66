"""What waits for itself is said: handlers that wait for threads which they hold, endpoints that wait for each other.

In virtual time where no threads take part: what a minute of waiting brings takes a moment.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import re
import threading
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest

from tests.runtime.cluster import Cluster, patiently, until
from triton_distributed.config import Config
from triton_distributed.errors import DeadlineExceeded
from triton_distributed.runtime import Client, DistributedRuntime
from triton_distributed.serving import threads
from triton_distributed.serving.threads import STUCK_S, Computation, HandlerThreads
from triton_distributed.testing import run_in_virtual_time

CONFIG = Config(discovery="memory", handle_signals=False)


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    caplog.set_level(logging.WARNING)
    return lambda: [each.getMessage() for each in caplog.records if each.levelno >= logging.WARNING]


# --- endpoints -------------------------------------------------------------------------------------------------------

Handler = Callable[[dict[str, Client], Any], Awaitable[Any]]


def run(
    handlers: dict[str, Handler], limits: dict[str, int], calls: list[tuple[str, Any]], seconds: float
) -> list[Any]:
    """Serve the handlers from one worker, make the calls at once, each with a deadline of so many seconds."""

    async def main() -> list[Any]:
        async with DistributedRuntime(config=CONFIG) as worker, DistributedRuntime(config=CONFIG) as caller:
            own: dict[str, Client] = {}
            for name, handler in handlers.items():

                def bound(handler: Handler = handler, name: str = name) -> Callable[[Any], Awaitable[Any]]:
                    async def serve(request: Any) -> Any:
                        return await handler(own, request)

                    serve.__qualname__ = f"{name}_handler"
                    return serve

                worker.endpoint(f"t.c.{name}").serve_endpoint(bound(), max_inflight=limits[name], max_queue=100)
            for name in handlers:
                own[name] = await worker.endpoint(f"t.c.{name}").client()
                await own[name].wait_for_instances()
            clients = {name: await caller.endpoint(f"t.c.{name}").client() for name in handlers}
            pending = [clients[name].call(request, timeout=seconds) for name, request in calls]
            return await asyncio.gather(*pending, return_exceptions=True)

    return run_in_virtual_time(main())


async def again(own: dict[str, Client], depth: int) -> int:
    return depth if depth == 0 else 1 + await own["again"].call(depth - 1)


async def one(own: dict[str, Client], request: Any) -> Any:
    return await own["other"].call(request)


async def other(own: dict[str, Client], request: Any) -> Any:
    await asyncio.sleep(0.1)
    return await own["one"].call(request)


async def takes_long(own: dict[str, Client], request: Any) -> Any:
    await asyncio.sleep(30)
    return request


async def passes_on(own: dict[str, Client], request: Any) -> Any:
    return await own["long"].call(request)


async def now_and_then(own: dict[str, Client], request: Any) -> Any:
    """One of two calls itself, the other only takes long: it ends, so nothing stands still."""
    return await (own["some"].call("long") if request == "calls" else takes_long(own, request))


def test_an_endpoint_that_calls_itself(said: Callable[[], list[str]]) -> None:
    (error,) = run({"again": again}, {"again": 1}, [("again", 1)], 3 * STUCK_S)
    assert isinstance(error, DeadlineExceeded)
    (text,) = said()
    assert "handler again_handler of t.c.again waits for calls to t.c.again, and that endpoint is full" in text
    assert "max_inflight=1: 1 waiting, none begun for 3.0 s" in text


def test_the_last_of_several_places(said: Callable[[], list[str]]) -> None:
    """Two places, and a chain of three: the first waits for one that runs, that one for one that cannot begin."""
    run({"again": again}, {"again": 2}, [("again", 2)], 3 * STUCK_S)
    (text,) = said()
    assert "max_inflight=2" in text


def test_two_endpoints_that_call_each_other(said: Callable[[], list[str]]) -> None:
    run({"one": one, "other": other}, {"one": 1, "other": 1}, [("one", 1), ("one", 2), ("other", 3)], 3 * STUCK_S)
    (text,) = said()
    assert "one_handler of t.c.one waits for calls to t.c.other" in text
    assert "other_handler of t.c.other waits for calls to t.c.one" in text


def test_a_circle_through_an_endpoint_that_has_room(said: Callable[[], list[str]]) -> None:
    """And whose other handler only takes long: the circle is one of requests."""

    async def through(own: dict[str, Client], request: Any) -> Any:
        return await (takes_long(own, request) if request == "long" else other(own, request))

    calls: list[tuple[str, Any]] = [("other", "long"), ("one", 1), ("one", 2)]
    run({"one": one, "other": through}, {"one": 1, "other": 5}, calls, 3 * STUCK_S)
    (text,) = said()
    assert "one_handler of t.c.one waits for calls to t.c.other, and that endpoint is full" in text
    assert "other_handler of t.c.other waits for calls to t.c.one." in text


def test_two_runtimes_of_one_process_that_call_each_other(said: Callable[[], list[str]]) -> None:
    async def main() -> None:
        async with (
            DistributedRuntime(config=CONFIG) as first,
            DistributedRuntime(config=CONFIG) as second,
            DistributedRuntime(config=CONFIG) as caller,
        ):
            own: dict[str, Client] = {}
            for runtime, name, handler in ((first, "one", one), (second, "other", other)):
                served = functools.partial(handler, own)
                runtime.endpoint(f"t.c.{name}").serve_endpoint(served, max_inflight=1, max_queue=9)
            for runtime, name in ((first, "other"), (second, "one")):
                own[name] = await runtime.endpoint(f"t.c.{name}").client()
                await own[name].wait_for_instances()
            client = await caller.endpoint("t.c.one").client()
            calls = [client.call(n, timeout=4 * STUCK_S) for n in range(3)]
            await asyncio.gather(*calls, return_exceptions=True)

    run_in_virtual_time(main())
    (text,) = [each for each in said() if "wait for each other" in each]
    assert "of t.c.one waits for calls to t.c.other, and that endpoint is full" in text
    assert "of t.c.other waits for calls to t.c.one. Raise" in text


@pytest.mark.parametrize(
    ("handlers", "limits", "calls"),
    [
        ({"long": takes_long}, {"long": 2}, [("long", n) for n in range(8)]),
        ({"long": takes_long, "front": passes_on}, {"long": 2, "front": 4}, [("front", n) for n in range(12)]),
        ({"some": now_and_then, "long": takes_long}, {"some": 2, "long": 1}, [("some", "long"), ("some", "calls")]),
    ],
    ids=["handlers that take long", "a chain of such", "one of two that calls itself"],
)
def test_handlers_that_only_take_long_are_not_named(
    handlers: dict[str, Handler], limits: dict[str, int], calls: list[Any], said: Callable[[], list[str]]
) -> None:
    assert not any(isinstance(each, Exception) for each in run(handlers, limits, calls, 1000.0))
    assert said() == []


def test_it_is_said_once_until_it_was_resolved(said: Callable[[], list[str]]) -> None:
    async def main() -> None:
        async with DistributedRuntime(config=CONFIG) as worker, DistributedRuntime(config=CONFIG) as caller:
            own: dict[str, Client] = {}
            worker.endpoint("t.c.again").serve_endpoint(functools.partial(again, own), max_inflight=1, max_queue=9)
            own["again"] = await worker.endpoint("t.c.again").client()
            await own["again"].wait_for_instances()
            client = await caller.endpoint("t.c.again").client()
            for seconds, lines in ((600, 1), (600, 2), (10, 3), (10, 3), (10, 3)):  # at most one in a minute
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(client.call(1), seconds)
                assert len(said()) == lines
                await asyncio.sleep(STUCK_S)

    run_in_virtual_time(main())


# --- threads ---------------------------------------------------------------------------------------------------------


async def test_plain_handlers_that_wait_for_plain_handlers(
    said: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads, "STUCK_S", 0.05)
    cluster = Cluster(threads=2)
    calls: dict[str, Client] = {}
    loop = asyncio.get_running_loop()

    def inner(request: Any) -> Any:
        return request

    def outer(request: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(calls["inner"].call(request, timeout=20), loop).result()

    worker = await cluster.worker(inner, "t.c.inner")
    await cluster.serve(worker, outer, "t.c.outer")
    calls["inner"] = await worker.endpoint("t.c.inner").client()
    client = await cluster.client("t.c.outer")
    pending = [asyncio.ensure_future(client.call(n)) for n in range(2)]
    await until(said)
    (text,) = said()
    assert "TRD_THREADS=2" in text
    assert f"{outer.__qualname__} (2)" in text
    assert re.search(rf"2 more wait, the first for \d\.\d s: {re.escape(inner.__qualname__)} \(2\)", text)
    for each in pending:
        each.cancel()
    await asyncio.wait(pending)
    await cluster.close()


class Blocks(Computation):
    def __init__(self, name: str, until: threading.Event) -> None:
        super().__init__(name)
        self.until = until

    def run(self) -> None:
        self.until.wait(20)

    def must_wait(self) -> bool:
        return not self.until.is_set()

    def stop(self) -> None:
        self.until.set()

    def left(self) -> None:
        pass


class Parks(Blocks):
    def __init__(self, pool: HandlerThreads, until: threading.Event) -> None:
        super().__init__("parks", until)
        self.pool = pool

    def run(self) -> None:
        self.pool.park(self)


@pytest.fixture
async def pool() -> Iterator[HandlerThreads]:  # type: ignore[misc]
    made = HandlerThreads(1)
    yield made
    made.close()


async def look(pool: HandlerThreads) -> None:
    """Have it look now, instead of in some seconds."""
    assert pool._timer is not None
    _, progress = pool._timer._args
    pool._timer.cancel()
    pool._look(asyncio.get_running_loop(), progress)


async def test_a_line_is_said_once_until_something_moves(
    pool: HandlerThreads, said: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = [threading.Event() for _ in range(3)]
    works = [Blocks(f"handler {n}", step) for n, step in enumerate(steps)]
    for each in works:
        pool.submit(each)
    for _ in range(5):
        await look(pool)
    (text,) = said()
    assert "handler 0 (1). 2 more wait" in text
    steps[0].set()
    await until(lambda: works[1].thread is not None)
    await look(pool)  # it has moved
    await look(pool)  # it stands again, and a minute is not over
    assert len(said()) == 1
    monkeypatch.setattr(threads, "SAID_AGAIN_S", 0.0)
    await look(pool)
    assert len(said()) == 2
    for step in steps:
        step.set()
    await until(lambda: not pool._running)
    await look(pool)
    assert pool._timer is None  # nothing waits, so nobody looks


async def test_threads_that_only_wait_for_readers_are_said_too(
    pool: HandlerThreads, said: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads, "MOST_PARKED", 1)
    read = threading.Event()
    parking = [Parks(pool, read) for _ in range(2)]
    for each in parking:
        pool.submit(each)
    await until(lambda: len(pool._parked) == 2)
    pool.submit(Blocks("waits", read))
    await look(pool)
    (text,) = said()
    assert "no more threads are available for plain handlers: 2 are in use, in 2 of them generators wait" in text
    assert "1 handlers wait" in text
    read.set()
    for each in parking:
        pool.go_on(each)
    await until(lambda: not pool._running and not pool._parked)


async def test_handlers_that_come_and_go_are_not_named(said: Callable[[], list[str]]) -> None:
    cluster = Cluster(threads=1)

    def handler(request: Any) -> Any:
        return request

    client = await cluster.connect(handler)
    await patiently(asyncio.gather(*(client.call(n) for n in range(200))))
    assert said() == []
    await cluster.close()
