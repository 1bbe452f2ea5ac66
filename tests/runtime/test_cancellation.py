"""Whoever leaves cancels the handler, at once and all the way down."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.runtime.cluster import Cluster, drained, longer, patiently, turns, until
from tests.runtime.programs import program
from tests.timing import PATIENCE_S
from triton_distributed.runtime import Client, Context, current_context


class Handlers:
    """Handlers that note how they began and ended."""

    def __init__(self) -> None:
        self.began = asyncio.Event()
        self.cancelled = asyncio.Event()
        self.ended = asyncio.Event()
        self.produced = 0

    async def waits(self, request: Any) -> AsyncIterator[Any]:
        """Yields an item, then waits in an await of its own."""
        try:
            self.began.set()
            yield 0
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        finally:
            self.ended.set()

    async def floods(self, request: Any) -> AsyncIterator[Any]:
        """Never awaits anything itself: back-pressure parks it at its yield."""
        try:
            self.began.set()
            while True:
                self.produced += 1
                yield "x" * 1000
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        finally:
            self.ended.set()

    async def ticks(self, request: Any) -> AsyncIterator[Any]:
        try:
            self.began.set()
            while True:
                yield 0
                await asyncio.sleep(0)
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        finally:
            self.ended.set()

    async def large(self, request: Any) -> AsyncIterator[Any]:
        """Is parked in the middle of an item."""
        try:
            self.began.set()
            while True:
                self.produced += 1
                yield b"x" * 4_000_000
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        finally:
            self.ended.set()


KINDS = ("waits", "floods", "ticks", "large")


async def by_break(client: Client) -> None:
    async for _ in client.generate(1):
        break


async def by_break_with_the_stream_kept(client: Client) -> Any:
    stream = await client.generate(1)
    async for _ in stream:
        break
    return stream


async def by_exception(client: Client) -> None:
    try:
        async for _ in client.generate(1):
            raise LookupError
    except LookupError:
        pass


async def by_exception_that_is_kept(client: Client) -> Any:
    try:
        async for _ in client.generate(1):
            raise LookupError
    except LookupError as error:
        return error


async def by_return(client: Client) -> Any:
    async for item in client.generate(1):
        return item
    return None


async def by_cancelled_reader(client: Client) -> None:
    got = asyncio.Event()

    async def reads() -> None:
        async for _ in client.generate(1):
            got.set()

    task = asyncio.create_task(reads())
    await got.wait()
    task.cancel()
    await asyncio.wait([task])


async def by_cancelled_body(client: Client) -> None:
    got = asyncio.Event()

    async def reads() -> None:
        async for _ in client.generate(1):
            got.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(reads())
    await got.wait()
    task.cancel()
    await asyncio.wait([task])


async def by_timeout_around(client: Client) -> None:
    async def reads() -> None:
        async for _ in client.generate(1):
            await asyncio.Event().wait()

    with pytest.raises(TimeoutError):
        await asyncio.wait_for(reads(), 0.05)


async def by_timeout_of_the_call(client: Client) -> None:
    with pytest.raises(TimeoutError):
        await drained(client.generate(1, timeout=0.05))


async def by_cancel(client: Client) -> Any:
    stream = client.generate(1)
    await anext(stream)
    assert stream.cancel()
    assert not stream.cancel()
    return stream


async def by_aclose(client: Client) -> Any:
    stream = client.generate(1)
    await anext(stream)
    await stream.aclose()
    return stream


async def by_drop_after_anext(client: Client) -> None:
    stream = client.generate(1)
    await anext(stream)
    del stream


async def by_kill(client: Client) -> Any:
    context = Context()
    stream = client.generate(1, context=context)
    await anext(stream)
    context.kill()
    return stream


async def by_cancelled_call(client: Client) -> None:
    task = asyncio.create_task(client.call(1, timeout=60))
    await turns()
    task.cancel()
    await asyncio.wait([task])


WAYS: list[Callable[[Client], Any]] = [
    by_break,
    by_break_with_the_stream_kept,
    by_exception,
    by_exception_that_is_kept,
    by_return,
    by_cancelled_reader,
    by_cancelled_body,
    by_timeout_around,
    by_timeout_of_the_call,
    by_cancel,
    by_aclose,
    by_drop_after_anext,
    by_kill,
]


@pytest.mark.any_loop
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("leave", WAYS)
async def test_leaving_cancels_the_handler_and_runs_its_finally(
    leave: Callable[[Client], Any], kind: str, cluster: Cluster
) -> None:
    handlers = Handlers()
    client = await cluster.connect(getattr(handlers, kind))
    kept = await patiently(leave(client))
    while not handlers.began.is_set():  # on a slow machine a short time may be over before the request is there
        kept = await patiently(leave(client))
    await patiently(handlers.ended.wait())
    assert handlers.cancelled.is_set()
    await until(lambda: client.stats.inflight == 0 and not len(client.load))
    del kept


@pytest.mark.parametrize("kind", KINDS)
async def test_leaving_over_a_unix_socket(kind: str, unix: Cluster) -> None:
    handlers = Handlers()
    client = await unix.connect(getattr(handlers, kind))
    kept = await patiently(by_break_with_the_stream_kept(client))
    await patiently(handlers.ended.wait())
    assert handlers.cancelled.is_set()
    del kept


async def test_a_cancelled_call_cancels_a_coroutine_handler(cluster: Cluster) -> None:
    began, ended = asyncio.Event(), asyncio.Event()

    async def handler(request: Any) -> None:
        try:
            began.set()
            await asyncio.Event().wait()
        finally:
            ended.set()

    client = await cluster.connect(handler)
    task = asyncio.create_task(client.call(1))
    await patiently(began.wait())
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await patiently(ended.wait())


async def test_a_stream_that_nobody_reads_is_not_cancelled_by_a_reader_elsewhere(cluster: Cluster) -> None:
    handlers = Handlers()
    client = await cluster.connect(handlers.waits)
    stream = await client.generate(1)
    await patiently(handlers.began.wait())
    await turns(100)
    assert not handlers.ended.is_set()
    stream.cancel()
    await patiently(handlers.ended.wait())


async def test_a_lost_client_cancels_its_handlers(unix: Cluster) -> None:
    handlers = Handlers()
    await unix.worker(handlers.waits)
    other = unix.runtime()
    client = await other.endpoint("t.c.e").client()
    stream = client.generate(1)
    await patiently(anext(stream))
    await other.close()
    await patiently(handlers.ended.wait())
    assert handlers.cancelled.is_set()
    del stream


async def test_finally_may_await_and_is_waited_for(cluster: Cluster) -> None:
    steps: list[str] = []
    ended = asyncio.Event()

    async def handler(request: Any) -> AsyncIterator[int]:
        try:
            while True:
                yield 1
                await asyncio.sleep(0)
        finally:
            steps.append("begin")
            await asyncio.sleep(0.01)
            steps.append("end")
            ended.set()

    client = await cluster.connect(handler)
    await patiently(by_break(client))
    await patiently(ended.wait())
    assert steps == ["begin", "end"]


async def test_a_deadline_does_not_cut_the_cleanup_of_a_cancelled_handler(cluster: Cluster) -> None:
    steps: list[str] = []

    async def handler(limit_s: float) -> AsyncIterator[int]:
        try:
            yield 1
            await asyncio.Event().wait()
        finally:
            try:
                await asyncio.sleep(2 * limit_s)  # until after the deadline
                steps.append("whole")
            except asyncio.CancelledError:
                steps.append("cut")
                raise

    worker = await cluster.worker(handler)
    client = await cluster.client()
    for limit_s in longer(0.1):
        steps.clear()
        try:
            async for _ in client.generate(limit_s, timeout=limit_s):
                break
        except TimeoutError:
            continue
        break
    await until(lambda: not worker.stats()["t/components/c/e"].inflight)
    assert steps == ["whole"]


async def test_a_handler_that_yields_while_it_is_cancelled_is_ended(cluster: Cluster) -> None:
    ended = asyncio.Event()

    async def handler(request: Any) -> AsyncIterator[int]:
        try:
            while True:
                try:
                    yield 1
                except asyncio.CancelledError:
                    yield 2
        finally:
            ended.set()

    client = await cluster.connect(handler)
    await patiently(by_break(client))
    await patiently(ended.wait())


async def test_a_handler_that_swallows_cancellation_does_not_block_the_loop(cluster: Cluster) -> None:
    passed = 0
    release = asyncio.Event()

    async def handler(request: Any) -> AsyncIterator[int]:
        nonlocal passed
        while not release.is_set():
            try:
                yield 1
                await asyncio.sleep(0)
            except asyncio.CancelledError:
                passed += 1

    client = await cluster.connect(handler)
    await patiently(by_break(client))
    await until(lambda: passed)
    release.set()


async def test_a_generator_closed_early_runs_its_finally_in_a_thread(cluster: Cluster) -> None:
    ended = threading.Event()
    stopped_in: list[str] = []

    def handler(request: Any) -> Iterator[int]:
        try:
            while True:
                yield 1
        finally:
            stopped_in.append(threading.current_thread().name)
            ended.set()

    client = await cluster.connect(handler)
    await patiently(by_break(client))
    await until(ended.is_set)
    assert stopped_in[0].startswith("trd-handler")


async def test_the_context_tells_that_the_caller_left(cluster: Cluster) -> None:
    seen: list[tuple[bool, bool]] = []
    ended = asyncio.Event()

    async def handler(request: Any, context: Context) -> AsyncIterator[int]:
        seen.append((context.is_stopped(), context.is_killed()))
        try:
            yield 1
            await asyncio.Event().wait()
        finally:
            seen.append((context.is_stopped(), context.is_killed()))
            ended.set()

    client = await cluster.connect(handler)
    await patiently(by_break(client))
    await patiently(ended.wait())
    assert seen == [(False, False), (True, True)]


async def test_stop_generating_lets_the_handler_finish_by_itself(cluster: Cluster) -> None:
    async def handler(request: Any, context: Context) -> AsyncIterator[Any]:
        while not context.is_stopped():
            yield "item"
            await asyncio.sleep(0)
        yield "last"

    client = await cluster.connect(handler)
    context = Context()
    items = []
    async for item in client.generate(1, annotated=False, context=context):
        items.append(item)
        context.stop_generating()
    assert items[0] == "item"
    assert items[-1] == "last"


async def test_stop_generating_reaches_a_call_that_is_made_or_sent_later(cluster: Cluster) -> None:
    async def handler(request: Any, context: Context) -> str:
        await context.stopped()
        return "stopped"

    client = await cluster.connect(handler)
    before = Context()
    before.stop_generating()
    assert await patiently(client.call(1, context=before)) == "stopped"
    during = Context()
    call = asyncio.create_task(client.call("large" * 100_000, context=during))
    await asyncio.sleep(0)
    during.stop_generating()
    assert await patiently(call) == "stopped"


async def test_a_call_with_a_killed_context_does_not_pass_for_an_empty_answer(cluster: Cluster) -> None:
    async def handler(request: Any) -> int:
        return 1

    client = await cluster.connect(handler)
    killed = Context()
    killed.kill()
    with pytest.raises(BaseException) as caught:  # noqa: PT011
        await patiently(drained(client.generate(1, context=killed)))
    assert not isinstance(caught.value, (StopAsyncIteration, TimeoutError))


async def test_a_stream_cancelled_by_another_task_does_not_end_cleanly(cluster: Cluster) -> None:
    handlers = Handlers()
    client = await cluster.connect(handlers.waits)
    stream = client.generate(1)
    reading = asyncio.create_task(drained(stream))
    await patiently(handlers.began.wait())
    await turns()
    stream.cancel()
    await patiently(asyncio.wait([reading]))
    assert reading.cancelled() or reading.exception() is not None


@pytest.mark.any_loop
@pytest.mark.parametrize("where", ["memory", "unix"])
async def test_a_call_left_in_the_turn_that_made_it_gives_its_slot_back(
    where: str, cluster: Cluster, unix: Cluster
) -> None:
    """Request and cancellation arrive together, before the handler's task has taken a step."""
    here = cluster if where == "memory" else unix

    async def echo(request: Any) -> Any:
        return request

    worker = await here.worker(echo, max_inflight=2, max_queue=2)
    client = await here.client()
    assert await patiently(client.call("warm")) == "warm"
    for n in range(20):
        client.generate(n).cancel()
        await turns(3)
    assert await patiently(client.call("after")) == "after"
    stats = worker.stats()["t/components/c/e"]
    await until(lambda: not stats.inflight)


# --- several hops ----------------------------------------------------------------------------------------------------


@pytest.mark.any_loop
@pytest.mark.parametrize("kind", KINDS)
async def test_three_hops_deep(kind: str, cluster: Cluster) -> None:
    handlers = Handlers()
    ends: list[str] = []
    await cluster.worker(getattr(handlers, kind), "t.c.inner")

    def passing(to: str, name: str) -> Any:
        async def handler(request: Any) -> AsyncIterator[Any]:
            try:
                async for item in (await cluster.client(to)).generate(request, annotated=False):
                    yield item
            finally:
                ends.append(name)

        return handler

    await cluster.worker(passing("t.c.inner", "middle"), "t.c.middle")
    await cluster.worker(passing("t.c.middle", "outer"), "t.c.outer")
    client = await cluster.client("t.c.outer")
    stream = await patiently(by_break_with_the_stream_kept(client))
    await patiently(handlers.ended.wait())
    assert handlers.cancelled.is_set()
    await until(lambda: sorted(ends) == ["middle", "outer"])
    del stream


async def test_calls_made_by_child_tasks_of_a_handler_are_cancelled_with_it(cluster: Cluster) -> None:
    handlers = Handlers()
    await cluster.worker(handlers.waits, "t.c.inner")

    async def fans_out(request: Any) -> AsyncIterator[int]:
        client = await cluster.client("t.c.inner")
        yield 1
        await asyncio.gather(*[drained(client.generate(1)) for _ in range(3)])

    outer = await cluster.connect(fans_out)
    async for _ in outer.generate(1):
        await patiently(handlers.began.wait())
        break
    await patiently(handlers.ended.wait())
    inner = await cluster.client("t.c.inner")
    await until(lambda: not len(inner.load))


HOP = """
import asyncio, sys
from triton_distributed.runtime import DistributedRuntime, triton_worker

@triton_worker()
async def main(runtime):
    name, to = sys.argv[1], sys.argv[2]
    client = await runtime.endpoint("t.c." + to).client() if to != "-" else None

    async def handler(request):
        try:
            if client is None:
                yield 0
                await asyncio.Event().wait()
            else:
                await client.wait_for_instances()
                async for item in client.generate(request, annotated=False):
                    yield item
        finally:
            print("finally", name, flush=True)

    await runtime.endpoint("t.c." + name).serve_endpoint(handler)

asyncio.run(main())
"""


async def test_three_processes_deep(unix: Cluster, tmp_path: Path) -> None:
    async with (
        program(tmp_path, HOP, "inner", "-") as inner,
        program(tmp_path, HOP, "middle", "inner") as middle,
        program(tmp_path, HOP, "outer", "middle") as outer,
    ):
        client = await unix.client("t.c.outer")
        stream = client.generate(1, annotated=False)
        async for item in stream:
            assert item == 0
            break
        for name, process in {"inner": inner, "middle": middle, "outer": outer}.items():
            assert await process.line() == f"finally {name}"
        del stream


# --- dropped by a collector ------------------------------------------------------------------------------------------


async def test_a_stream_dropped_by_a_collection_in_another_thread_is_cancelled(cluster: Cluster) -> None:
    handlers = Handlers()
    client = await cluster.connect(handlers.waits)
    gc.disable()
    try:
        stream = client.generate(1)
        await patiently(anext(stream))
        cycle: list[Any] = [stream]
        cycle.append(cycle)
        del stream, cycle
        collector = threading.Timer(0.05, gc.collect)  # when the loop sleeps
        collector.start()
        await asyncio.wait_for(handlers.ended.wait(), PATIENCE_S)
        collector.join()
    finally:
        gc.enable()


async def test_current_context_is_none_outside_of_handlers(cluster: Cluster) -> None:
    assert current_context() is None
