"""`runtime.requests()`, and the questions that every worker answers about itself."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest

from tests.runtime.cluster import Cluster, patiently, until
from triton_distributed.discovery import Added, Change, Removed, Snapshot
from triton_distributed.discovery.memory import MemoryDiscovery
from triton_distributed.errors import InvalidRequest, NoInstances
from triton_distributed.names import INSPECT, EndpointName, Instance
from triton_distributed.runtime import Client, DistributedRuntime, RequestReport, RuntimeStatistics
from triton_distributed.runtime.answering import CHUNK, read_reports
from triton_distributed.runtime.inspection import WorkersDiscovery
from triton_distributed.runtime.reports import WorkerReport

HERE = __file__


async def forever(request: Any) -> AsyncIterator[Any]:
    await inside()
    yield request


async def inside() -> None:
    await asyncio.get_running_loop().create_future()


def calls(client: Client) -> Any:
    async def handler(request: Any) -> AsyncIterator[Any]:
        async for item in client.generate(request, annotated=False):
            yield item

    return handler


async def asking(cluster: Cluster) -> Client:
    """A client of the workers themselves."""
    runtime = DistributedRuntime(config=cluster.caller.config, discovery=WorkersDiscovery(MemoryDiscovery()))
    cluster.runtimes.append(runtime)
    return await runtime.endpoint(str(INSPECT)).client()


async def answer(client: Client, worker: DistributedRuntime, **question: Any) -> list[Any]:
    return [each async for each in client.direct(question, worker.instance_id, annotated=False)]


async def test_each_request_says_where_it_waits(cluster: Cluster) -> None:
    worker = cluster.runtime()
    await cluster.serve(worker, forever, "t.c.inner", max_inflight=1, max_queue=9)
    inner = await cluster.client("t.c.inner")
    await cluster.serve(worker, calls(inner), "t.c.outer")
    outer = await cluster.client("t.c.outer")
    streams = [outer.generate(1), outer.generate(2)]
    states = [("t.c.inner", "running"), ("t.c.inner", "waiting"), ("t.c.outer", "running"), ("t.c.outer", "running")]
    await until(lambda: sorted((each.endpoint, each.state) for each in worker.requests()) == states)

    found = {(each.endpoint, each.state): each for each in worker.requests(stacks=True)}
    running, waiting, caller = (
        found["t.c.inner", "running"],
        found["t.c.inner", "waiting"],
        found["t.c.outer", "running"],
    )
    assert isinstance(running, RequestReport)
    assert running.instance_id == worker.instance_id
    assert [line.rpartition(" in ")[2] for line in running.stack] == ["forever", "inside"]
    assert running.line == running.stack[-1]
    assert running.line.startswith(HERE)
    assert (waiting.ahead, waiting.line, waiting.stack) == (1, "", ())
    ((called, instance, sent),) = [(each.endpoint, each.instance_id, each.sent) for each in caller.calls]
    assert (called, instance, sent) == ("t.c.inner", worker.instance_id, True)
    assert {each.id for each in worker.requests() if each.endpoint == "t.c.outer"} == {running.id, waiting.id}
    for each in streams:
        each.cancel()
    await until(lambda: not worker.requests())


async def test_a_caller_that_does_not_read_is_named(cluster: Cluster) -> None:
    async def flood(request: Any) -> AsyncIterator[Any]:
        while True:
            yield "x" * 1000

    worker = cluster.runtime()
    await cluster.serve(worker, flood)
    client = await cluster.client()
    stream = client.generate(1)
    reader = aiter(stream)
    await patiently(anext(reader))
    await until(lambda: worker.requests()[0].blocked)
    stream.cancel()


async def test_a_full_worker_answers_and_lists_nothing_for_it(cluster: Cluster) -> None:
    worker = cluster.runtime(max_requests=1)
    await cluster.serve(worker, forever, max_inflight=1)
    client = await cluster.client()
    call = client.generate(1, timeout=3600)
    await until(worker.requests)
    workers = await asking(cluster)
    assert workers.instance_ids() == [worker.instance_id]
    (statistics,) = await answer(workers, worker, about="statistics")
    found = msgspec.convert(statistics, RuntimeStatistics)
    assert [each.name for each in found.endpoints] == ["t/components/c/e"]
    (reports,) = await answer(workers, worker, about="requests")
    (report,) = read_reports(reports)
    assert report.remaining_s is not None
    assert 0 < report.remaining_s <= 3600
    assert await answer(workers, worker, about="requests", id="another") == []
    (stacks,) = await answer(workers, worker, about="stacks")
    assert "MainThread" in stacks
    assert "in _stacks" in stacks["MainThread"]
    call.cancel()


async def test_many_requests_come_in_several_items(cluster: Cluster) -> None:
    worker = cluster.runtime()
    await cluster.serve(worker, forever)
    client = await cluster.client()
    calls = [client.generate(number) for number in range(CHUNK + 1)]
    await until(lambda: len(worker.requests()) == CHUNK + 1)
    items = await answer(await asking(cluster), worker, about="requests")
    assert [len(each) for each in items] == [CHUNK, 1]
    for each in calls:
        each.cancel()


@pytest.mark.parametrize("question", [{"about": "secrets"}, {}, {"about": "requests", "more": 1}, 7])
async def test_an_invalid_question(cluster: Cluster, question: Any) -> None:
    worker = cluster.runtime()
    await cluster.serve(worker, forever)
    workers = await asking(cluster)
    with pytest.raises(InvalidRequest):
        [each async for each in workers.direct(question, worker.instance_id)]


async def test_a_worker_is_listed_once_and_until_its_last_endpoint_is_gone() -> None:
    discovery = MemoryDiscovery()
    one, two = (Instance(EndpointName("n", "c", name), 5, ("memory://x",), busy=True) for name in ("a", "b"))
    await discovery.register(one)
    await discovery.register(two)
    seen: list[Change] = []
    watch = await WorkersDiscovery(discovery).watch(INSPECT, seen.append)
    worker = Instance(INSPECT, 5, ("memory://x",))
    assert seen == [Snapshot((worker,))]
    await discovery.withdraw(one)
    await until(lambda: True)
    assert seen == [Snapshot((worker,))]
    await discovery.withdraw(two)
    await discovery.register(one)
    await until(lambda: len(seen) == 3)
    assert seen[1:] == [Removed(INSPECT, 5), Added(worker)]
    watch.close()
    await discovery.close()


async def test_a_worker_is_found_while_all_its_endpoints_are_paused(cluster: Cluster) -> None:
    worker = cluster.runtime()
    await cluster.serve(worker, forever, max_inflight=3)
    endpoint, workers = worker.endpoint("t.c.e"), await asking(cluster)
    everything: list[Change] = []
    watch = await MemoryDiscovery().watch(None, everything.append)
    for _ in range(2):
        await endpoint.pause()
        await endpoint.pause()
        (report,) = await answer(workers, worker, about="worker")
        (served,) = msgspec.convert(report, WorkerReport).endpoints
        assert (str(served.endpoint), served.state, served.max_inflight) == ("t.c.e", "paused", 3)
        await endpoint.resume()
        (report,) = await answer(workers, worker, about="worker")
        assert msgspec.convert(report, WorkerReport).endpoints[0].state == "serving"
    await endpoint.pause()
    await worker.close()
    await until(lambda: workers.instance_ids() == [])
    added = [each.instance.endpoint for each in everything if isinstance(each, Added)]
    removed = [each.endpoint for each in everything if isinstance(each, Removed)]
    assert added.count(INSPECT) == removed.count(INSPECT) == 3
    watch.close()


@pytest.mark.any_loop
async def test_a_draining_worker_says_what_holds_it_up(cluster: Cluster) -> None:
    started, go = asyncio.Event(), asyncio.Event()

    async def slow(request: Any) -> AsyncIterator[Any]:
        started.set()
        await go.wait()
        yield request

    worker, idle = cluster.runtime(), cluster.runtime()
    await cluster.serve(worker, slow)
    client = await cluster.client()
    call = asyncio.create_task(client.call(1))
    await patiently(started.wait())
    await cluster.serve(idle, slow, "t.c.idle")
    everything: list[Change] = []
    watch = await MemoryDiscovery().watch(None, everything.append)
    closing = asyncio.create_task(worker.close())
    await idle.close()  # Nothing runs there, so nothing has to be asked.
    await until(lambda: [each.instance.endpoint for each in everything if isinstance(each, Added)] == [INSPECT])
    workers = await asking(cluster)  # It comes after the drain has begun, and has no session yet.
    (report,) = await answer(workers, worker, about="worker")
    (served,) = msgspec.convert(report, WorkerReport).endpoints
    assert (str(served.endpoint), served.state, served.running) == ("t.c.e", "draining", 1)
    ((request,),) = map(read_reports, await answer(workers, worker, about="requests"))
    assert (request.endpoint, request.state) == ("t.c.e", "running")
    late = cluster.runtime()
    direct = await late.endpoint("t.c.e").client()
    with pytest.raises(NoInstances):  # Calls cannot find it.
        await direct.call(2)
    assert not closing.done()
    go.set()
    assert await patiently(call) == 1
    await patiently(closing)
    await until(lambda: workers.instance_ids() == [])
    watch.close()
