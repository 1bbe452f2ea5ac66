"""Time limits of calls: they travel, are inherited, and what is late is not begun."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.runtime.cluster import Cluster, drained, into, longer, patiently, until
from tests.timing import PATIENCE_S, ROUNDED_S
from triton_distributed.errors import DeadlineExceeded, RemoteError
from triton_distributed.names import EndpointName, Instance
from triton_distributed.runtime import Context, current_context


async def forever(request: Any) -> AsyncIterator[int]:
    yield 1
    await asyncio.Event().wait()


@pytest.mark.any_loop
async def test_a_call_ends_when_its_time_is_over(cluster: Cluster) -> None:
    client = await cluster.connect(forever)
    items: list[int] = []
    for calls, limit_s in enumerate(longer(0.05), 1):
        with pytest.raises(DeadlineExceeded, match=f"{limit_s:g} s") as caught:
            await into(items, client.generate(1, annotated=False, timeout=limit_s))
        assert isinstance(caught.value, TimeoutError)
        assert "t/components/c/e" in str(caught.value)
        assert caught.value.timeout_s == limit_s
        assert client.stats.outcomes()["deadline"] == calls
        if items:
            break
    assert items == [1]
    with pytest.raises(TimeoutError):
        await patiently(client.call(1, timeout=0.05))


async def test_enough_time_changes_nothing(cluster: Cluster) -> None:
    async def handler(request: Any, context: Context) -> float | None:
        return context.remaining_s()

    client = await cluster.connect(handler)
    left = await patiently(client.call(1, timeout=1000))
    assert 900 < left <= 1000 + ROUNDED_S
    assert await patiently(client.call(1)) is None


async def test_both_sides_count_a_deadline_as_one(cluster: Cluster) -> None:
    worker = await cluster.worker(forever)
    client = await cluster.client()
    stats = worker.stats()["t/components/c/e"]
    items: list[int] = []
    for limit_s in longer(0.05):
        with pytest.raises(DeadlineExceeded):
            await into(items, client.generate(1, annotated=False, timeout=limit_s))
        await until(lambda: not stats.inflight)
        if items:
            break
    # The caller's CANCEL and the worker's own clock race; neither counts as an error of the handler.
    assert stats.outcomes()["error"] == 0
    assert stats.outcomes()["deadline"] + stats.outcomes()["cancelled"] >= 1


async def test_a_deadline_is_inherited_through_hops(cluster: Cluster) -> None:
    seen: list[float | None] = []
    ended = asyncio.Event()

    async def inner(request: Any, context: Context) -> AsyncIterator[int]:
        seen.append(context.remaining_s())
        try:
            yield 1
            await asyncio.Event().wait()
        finally:
            ended.set()

    async def middle(request: Any, context: Context) -> AsyncIterator[Any]:
        seen.append(context.remaining_s())
        async for item in (await cluster.client("t.c.inner")).generate(request, annotated=False):
            yield item

    async def outer(request: Any) -> AsyncIterator[Any]:
        async for item in (await cluster.client("t.c.middle")).generate(request, annotated=False, timeout=100):
            yield item

    await cluster.worker(inner, "t.c.inner")
    await cluster.worker(middle, "t.c.middle")
    await cluster.worker(outer, "t.c.outer")
    client = await cluster.client("t.c.outer")
    for limit_s in longer(0.3):
        seen.clear()
        items: list[int] = []
        with pytest.raises(TimeoutError):
            await into(items, client.generate(1, annotated=False, timeout=limit_s))
        if items:
            break
    await patiently(ended.wait())
    first, second = seen
    assert first is not None
    assert second is not None
    assert first <= limit_s + ROUNDED_S
    assert first + ROUNDED_S >= second > 0


async def test_a_hop_may_shorten_but_not_lengthen(cluster: Cluster) -> None:
    async def inner(request: Any, context: Context) -> float | None:
        return context.remaining_s()

    async def outer(request: float) -> float:
        return float(await (await cluster.client("t.c.inner")).call(None, timeout=request))

    await cluster.worker(inner, "t.c.inner")
    await cluster.worker(outer, "t.c.outer")
    client = await cluster.client("t.c.outer")
    assert await patiently(client.call(10.0, timeout=1000)) <= 10 + ROUNDED_S
    assert 10 < await patiently(client.call(100_000.0, timeout=1000)) <= 1000 + ROUNDED_S


async def test_a_deadline_is_inherited_by_child_tasks_and_threads(cluster: Cluster) -> None:
    async def inner(request: Any, context: Context) -> float | None:
        return context.remaining_s()

    async def tasks(request: Any) -> Any:
        client = await cluster.client("t.c.inner")
        return await asyncio.create_task(client.call(None))

    loop = asyncio.get_running_loop()

    def threads(request: Any) -> Any:
        async def call() -> Any:
            return await (await cluster.client("t.c.inner")).call(None)

        assert current_context() is not None
        return asyncio.run_coroutine_threadsafe(call(), loop).result(PATIENCE_S)

    await cluster.worker(inner, "t.c.inner")
    for name, handler in {"t.c.tasks": tasks, "t.c.threads": threads}.items():
        await cluster.worker(handler, name)
        assert 0 < await patiently((await cluster.client(name)).call(1, timeout=1000)) <= 1000 + ROUNDED_S


async def test_work_whose_time_is_over_is_not_begun(cluster: Cluster) -> None:
    began = []

    async def handler(request: Any) -> Any:
        began.append(request)

    worker = await cluster.worker(handler)
    client = await cluster.client()
    await patiently(client.call("warm"))
    for timeout in (0, -1, 0.0):
        with pytest.raises(DeadlineExceeded):
            await patiently(client.call("late", timeout=timeout))
    await patiently(client.call("last"))
    assert began == ["warm", "last"]
    assert worker.stats()["t/components/c/e"].outcomes()["ok"] == 2


async def test_work_whose_time_ends_in_the_queue_is_not_begun(cluster: Cluster) -> None:
    began: list[Any] = []
    release = asyncio.Event()

    async def handler(request: Any) -> None:
        began.append(request)
        if request == "first":
            await release.wait()

    client = await cluster.connect(handler, max_inflight=1, max_queue=5)
    first = asyncio.create_task(client.call("first"))
    await until(lambda: began)
    with pytest.raises(DeadlineExceeded):
        await patiently(client.call("late", timeout=0.05))
    await until(lambda: not cluster.served()[0].waiting)  # the worker's clock for it began later than the caller's
    release.set()
    await patiently(first)
    await patiently(client.call("last"))
    assert began == ["first", "last"]


async def test_plain_work_whose_time_ends_before_a_thread_is_free_is_not_begun() -> None:
    cluster = Cluster(threads=1)
    began: list[Any] = []
    release = threading.Event()

    def handler(request: Any) -> None:
        began.append(request)
        if request == "first":
            release.wait(PATIENCE_S)

    client = await cluster.connect(handler)
    first = asyncio.create_task(client.call("first"))
    await until(lambda: began)
    with pytest.raises(DeadlineExceeded):
        await patiently(client.call("late", timeout=0.05))
    left = asyncio.create_task(client.call("left"))
    await until(lambda: client.stats.inflight == 2)
    left.cancel()
    await asyncio.wait([left])
    await until(lambda: cluster.served()[0].running == 1)  # the worker has dropped both
    release.set()
    await patiently(first)
    await patiently(client.call("last"))
    assert began == ["first", "last"]
    await cluster.close()


async def test_a_deadline_cancels_a_handler_whose_client_cannot_say_so(unix: Cluster, trd_dir: Path) -> None:
    """The worker keeps the time by itself: here the caller's loop stands still."""
    began, ended = threading.Event(), threading.Event()

    async def handler(request: Any) -> None:
        began.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    ready = threading.Event()
    stop = threading.Event()

    def serve() -> None:
        async def main() -> None:
            other = Cluster(discovery="file", directory=trd_dir)
            await other.worker(handler)
            ready.set()
            while not stop.is_set():
                await asyncio.sleep(0.01)
            await other.close()

        asyncio.run(main())

    thread = threading.Thread(target=serve)
    thread.start()
    assert await asyncio.to_thread(ready.wait, PATIENCE_S)
    client = await unix.client()
    with pytest.raises(DeadlineExceeded):
        await patiently(client.call(1, timeout=0.05))
    for limit_s in longer(0.2):
        began.clear()
        ended.clear()
        stream = await client.generate(1, timeout=limit_s)
        await asyncio.sleep(0)
        handled = began.wait(2 * limit_s) and ended.wait(PATIENCE_S)  # blocks this loop
        with pytest.raises(DeadlineExceeded):
            await patiently(drained(stream))
        if handled:
            break
    stop.set()
    await asyncio.to_thread(thread.join)


async def test_a_deadline_ends_a_call_that_is_still_being_sent(cluster: Cluster) -> None:
    async def says_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(1000):
            pass
        writer.close()

    server = await asyncio.start_server(says_nothing, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    await cluster.caller.discovery.register(Instance(EndpointName("t", "c", "e"), 7, (f"tcp://127.0.0.1:{port}",)))
    client = await cluster.client()
    with pytest.raises(DeadlineExceeded):
        await patiently(drained(client.generate(1, timeout=0.05)))
    with pytest.raises(DeadlineExceeded):
        await patiently(client.call(1, timeout=0.05))
    assert client.stats.inflight == 0
    server.close()


async def test_a_deadline_of_the_worker_is_told_apart_from_a_timeout_of_the_handler(cluster: Cluster) -> None:
    async def handler(request: Any) -> None:
        raise TimeoutError("the model took too long")

    client = await cluster.connect(handler)
    with pytest.raises(TimeoutError, match="the model took too long") as caught:
        await patiently(client.call(1, timeout=100))
    assert not isinstance(caught.value, DeadlineExceeded)
    assert isinstance(caught.value, RemoteError)


async def test_a_deadline_met_in_a_handlers_own_call_reaches_the_caller_as_one(cluster: Cluster) -> None:
    await cluster.worker(forever, "t.c.inner")

    async def outer(request: Any) -> Any:
        return await (await cluster.client("t.c.inner")).call(1, timeout=0.05)

    client = await cluster.connect(outer)
    with pytest.raises(DeadlineExceeded):
        await patiently(client.call(1, timeout=100))
    with pytest.raises(DeadlineExceeded, match="t/components/c/inner"):
        await patiently(client.call(1))


async def test_a_deadline_names_who_never_answered(trd_dir: Path) -> None:
    """As of a worker that is stopped: its socket takes connections, and nobody says hello."""
    silent = socket.socket()
    silent.bind(("127.0.0.1", 0))
    silent.listen()
    address = f"tcp://127.0.0.1:{silent.getsockname()[1]}"
    cluster = Cluster(discovery="static", static=f"t.c.e={address}")
    client = await cluster.caller.endpoint("t.c.e").client()
    with pytest.raises(DeadlineExceeded, match=f"{address}: no connection yet") as caught:
        await patiently(client.call(1, timeout=0.05))
    assert caught.value.attempts == ((address, "no connection yet"),)
    await cluster.close()
    silent.close()
