"""`runtime.statistics()` says what a runtime is doing, part by part."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from tests.runtime.cluster import Cluster, patiently, until
from triton_distributed.config import Config
from triton_distributed.runtime import DistributedRuntime, RuntimeStatistics

SETTLED = {"waiting": 0, "announced": 0, "running": 0, "cleaning": 0}


class Held:
    """A handler that yields once, then waits until it is let go; its clean-up waits as well."""

    def __init__(self) -> None:
        self.go_on = asyncio.Event()
        self.clean = asyncio.Event()

    async def __call__(self, request: Any) -> Any:
        try:
            yield request
            await self.go_on.wait()
        finally:
            await self.clean.wait()


async def test_a_runtime_that_does_nothing(cluster: Cluster) -> None:
    runtime = cluster.runtime()
    found = runtime.statistics()
    assert isinstance(found, RuntimeStatistics)
    assert (found.instance_id, found.state) == (runtime.instance_id, "open")
    for each in (found.endpoints, found.calls, found.sessions, found.subscriptions, found.queues):
        assert each == ()
    assert (found.held_bytes, found.tasks) == (0, 0)
    assert (found.discovery.backend, found.discovery.registered) == ("MemoryDiscovery", ())
    with pytest.raises(AttributeError):
        found.tasks = 1  # type: ignore[misc]
    await runtime.close()
    assert runtime.statistics().state == "closed"


async def test_requests_and_their_states(cluster: Cluster) -> None:
    held = Held()
    worker = cluster.runtime()
    await cluster.serve(worker, held, max_inflight=1, max_queue=2)
    client = await cluster.client()
    (endpoint,) = worker.statistics().endpoints
    assert (endpoint.name, endpoint.state, endpoint.requests) == ("t/components/c/e", "serving", SETTLED)
    assert (endpoint.max_inflight, endpoint.max_queue) == (1, 2)
    assert endpoint.listed == endpoint.addresses != ()

    running, waiting = aiter(client.generate(1, annotated=False)), client.generate(2, annotated=False)
    assert await patiently(anext(running)) == 1
    await until(lambda: worker.statistics().endpoints[0].waiting)
    (endpoint,) = worker.statistics().endpoints
    assert (endpoint.running, endpoint.waiting) == (1, 1)
    assert endpoint.requests == {**SETTLED, "waiting": 1, "running": 1}

    del running
    await until(lambda: worker.statistics().endpoints[0].requests["cleaning"])
    assert worker.statistics().endpoints[0].running == 1
    held.clean.set()
    held.go_on.set()
    assert [each async for each in waiting] == [2]
    await until(lambda: not worker.statistics().endpoints[0].running)
    (endpoint,) = worker.statistics().endpoints
    assert endpoint.requests == SETTLED
    assert (endpoint.outcomes["ok"], endpoint.outcomes["cancelled"], endpoint.items) == (1, 1, 1)
    assert endpoint.mean_s > 0


async def test_calls_and_the_instances_that_they_may_go_to(cluster: Cluster) -> None:
    held = Held()
    worker = cluster.runtime()
    await cluster.serve(worker, held)
    caller = cluster.runtime()
    client = await caller.endpoint("t.c.e").client()
    other = await caller.endpoint("t.c.e").client()
    stream = aiter(client.generate(1, annotated=False))
    assert await patiently(anext(stream)) == 1
    call = aiter(other.generate(2, annotated=False))
    assert await patiently(anext(call)) == 2
    (calls,) = caller.statistics().calls
    assert (calls.name, calls.clients, calls.open) == ("t/components/c/e", 2, 2)
    assert calls.instances == calls.candidates == (worker.instance_id,)
    assert calls.load == {worker.instance_id: 2}
    assert (calls.out_of_rotation, calls.ejected, calls.ejections) == ({}, 0, 0)
    held.clean.set()
    del stream, call
    await until(lambda: not caller.statistics().calls[0].open)
    (calls,) = caller.statistics().calls
    assert (calls.outcomes["cancelled"], calls.load) == (2, {})


async def test_sessions_with_their_streams_and_windows(cluster: Cluster) -> None:
    held = Held()
    worker = cluster.runtime()
    await cluster.serve(worker, held)
    caller = cluster.runtime()
    client = await caller.endpoint("t.c.e").client()
    stream = aiter(client.generate(1, annotated=False))
    assert await patiently(anext(stream)) == 1
    (dialled,), (accepted,) = caller.statistics().sessions, worker.statistics().sessions
    assert (dialled.role, accepted.role) == ("dialled", "accepted")
    for session in (dialled, accepted):
        assert (session.phase, session.streams, session.blocked) == ("open", 1, 0)
        assert not session.silent
        assert session.window_bytes < session.window_limit_bytes == caller.config.session_window_bytes
    assert dialled.window_bytes
    assert not accepted.window_bytes, "the request has come whole"
    held.clean.set()
    del stream
    await until(lambda: not caller.statistics().sessions[0].window_bytes)
    assert caller.statistics().sessions[0].streams == 0


async def test_an_endpoint_that_is_paused_is_listed_nowhere(cluster: Cluster) -> None:
    async def echo(request: Any) -> Any:
        return request

    worker = cluster.runtime()
    await cluster.serve(worker, echo)
    assert worker.statistics().discovery.registered == ("t/components/c/e",)
    await worker.endpoint("t.c.e").pause()
    found = worker.statistics()
    assert (found.endpoints[0].state, found.endpoints[0].listed, found.discovery.registered) == ("paused", (), ())
    await worker.endpoint("t.c.e").resume()
    assert worker.statistics().discovery.registered == ("t/components/c/e",)


async def test_a_worker_that_is_gone_is_out_of_rotation() -> None:
    addresses = "t.c.e=memory://nobody-listens-here"
    async with DistributedRuntime(config=Config(discovery="static", static=addresses, retries=0)) as caller:
        client = await caller.endpoint("t.c.e").client()
        with pytest.raises(Exception, match="nobody-listens-here"):
            await patiently(client.call(1))
        (calls,) = caller.statistics().calls
        assert list(calls.out_of_rotation) == list(calls.instances) != []
        assert (calls.open, calls.outcomes["unreachable"]) == (0, 1)
        assert (calls.name, caller.statistics().discovery.watched) == ("t/components/c/e", ("t/components/c/e",))


async def test_subscriptions_and_what_waits_in_them(cluster: Cluster) -> None:
    runtime = cluster.runtime()
    component = runtime.namespace("t").component("c")
    async with component.subscribe("news", max_events=2):
        for number in range(3):
            await component.publish("news", number)
        await until(lambda: runtime.statistics().subscriptions[0].dropped)
        (subscription,) = runtime.statistics().subscriptions
        assert subscription.subject == component.event_subject("news")
        assert (subscription.waiting, subscription.dropped) == (2, 1)
        assert subscription.waiting_bytes > 0
    assert runtime.statistics().subscriptions == ()


async def test_threads_of_plain_handlers(cluster: Cluster) -> None:
    go_on = threading.Event()

    def plain(request: Any) -> Any:
        go_on.wait()
        return request

    worker = cluster.runtime(threads=1)
    await cluster.serve(worker, plain)
    client = await cluster.client()
    calls = [asyncio.ensure_future(client.call(number)) for number in range(2)]
    await until(lambda: worker.statistics().threads.waiting == 1)
    threads = worker.statistics().threads
    assert (threads.limit, threads.running, threads.parked, threads.waiting, threads.threads) == (1, 1, 0, 1, 1)
    go_on.set()
    assert await patiently(asyncio.gather(*calls)) == [0, 1]
    await until(lambda: not worker.statistics().threads.running)


async def test_the_loop(cluster: Cluster) -> None:
    async def echo(request: Any) -> Any:
        return request

    worker = cluster.runtime()
    await cluster.serve(worker, echo)
    await until(lambda: sum(worker.statistics().loop.lag))
    assert worker.statistics().loop.stalls == worker.loop_stats.stalls
