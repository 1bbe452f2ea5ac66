"""`endpoint.pause()` and `resume()`: out of rotation and back, while everything that is here goes on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.runtime.cluster import Cluster, drained, patiently, until
from triton_distributed.errors import (
    DiscoveryError,
    InstanceNotFound,
    NoInstances,
    NotServed,
    Paused,
    RuntimeClosed,
)
from triton_distributed.runtime import Client, DistributedRuntime


class Workers:
    """Two workers of `t.c.e` that answer with their ids; a `hold` is answered and then goes on until released."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self.release = asyncio.Event()

    async def start(self) -> tuple[DistributedRuntime, DistributedRuntime, Client]:
        one, other = self._cluster.runtime(), self._cluster.runtime()
        for runtime in (one, other):
            await self._cluster.serve(runtime, self._handler(runtime))
        client = await self._cluster.client()
        await until(lambda: len(client.instance_ids()) == 2)
        return one, other, client

    def _handler(self, runtime: DistributedRuntime) -> Any:
        async def handler(request: Any) -> AsyncIterator[int]:
            yield runtime.instance_id
            if request == "hold":
                await self.release.wait()
                yield runtime.instance_id

        return handler


async def check_pause_and_resume(cluster: Cluster) -> None:
    workers = Workers(cluster)
    one, other, client = await workers.start()
    id = one.instance_id
    held = client.direct("hold", id, annotated=False)
    assert await patiently(anext(held)) == id
    for _ in range(2):  # twice is harmless
        await patiently(one.endpoint("t.c.e").pause())
    await until(lambda: client.instance_ids() == [other.instance_id])
    assert {await patiently(client.call(n)) for n in range(10)} == {other.instance_id}
    with pytest.raises(InstanceNotFound):
        await patiently(drained(client.direct(1, id)))
    workers.release.set()
    assert await patiently(drained(held)) == [id]  # what ran went on
    for _ in range(2):
        await patiently(one.endpoint("t.c.e").resume())
    await until(lambda: sorted(client.instance_ids()) == sorted((id, other.instance_id)))
    assert {await patiently(client.call(n)) for n in range(4)} == {id, other.instance_id}


@pytest.mark.any_loop
async def test_others_are_called_while_it_is_paused(cluster: Cluster) -> None:
    await check_pause_and_resume(cluster)


async def test_through_files(unix: Cluster) -> None:
    await check_pause_and_resume(unix)


async def test_a_paused_instance_begins_nothing_even_for_clients_that_are_connected(cluster: Cluster) -> None:
    workers = Workers(cluster)
    one, other, client = await workers.start()
    assert {await patiently(client.call(n)) for n in range(4)} == {one.instance_id, other.instance_id}
    held = client.direct("hold", one.instance_id, annotated=False)
    assert await patiently(anext(held)) == one.instance_id
    for each in (one, other):
        await patiently(each.endpoint("t.c.e").pause())
    with pytest.raises((Paused, NoInstances)):
        await patiently(client.call(1))
    await until(lambda: not client.instance_ids())
    with pytest.raises((Paused, NoInstances)):
        await patiently(client.call(1))
    workers.release.set()
    assert await patiently(drained(held)) == [one.instance_id]
    await patiently(other.endpoint("t.c.e").resume())
    await until(lambda: client.instance_ids() == [other.instance_id])
    assert await patiently(client.call(1)) == other.instance_id


async def test_requests_that_a_paused_instance_refuses_go_elsewhere(cluster: Cluster) -> None:
    workers = Workers(cluster)
    one, other, client = await workers.start()
    waiting = [asyncio.ensure_future(client.call(n)) for n in range(20)]
    pausing = asyncio.ensure_future(one.endpoint("t.c.e").pause())
    waiting += [asyncio.ensure_future(client.call(n)) for n in range(20)]
    await patiently(pausing)
    assert {await patiently(each) for each in waiting} <= {one.instance_id, other.instance_id}
    refused = cluster.runtime()

    async def echo(request: Any) -> Any:
        await workers.release.wait()
        return "done"

    await cluster.serve(refused, echo, "t.c.queued", max_inflight=1, max_queue=5)
    queued = await cluster.client("t.c.queued")
    first, second = (asyncio.ensure_future(queued.call(n)) for n in range(2))
    await until(lambda: refused.stats()["t/components/c/queued"].inflight == 1)
    await until(lambda: queued.stats.inflight == 2)
    await patiently(refused.endpoint("t.c.queued").pause())
    with pytest.raises((Paused, NoInstances)):
        await patiently(second)
    workers.release.set()
    assert await patiently(first) == "done"


async def test_only_that_endpoint_is_paused(cluster: Cluster) -> None:
    runtime = cluster.runtime()

    async def echo(request: Any) -> Any:
        return request

    await cluster.serve(runtime, echo)
    await cluster.serve(runtime, echo, "t.c.other")
    paused, other = await cluster.client(), await cluster.client("t.c.other")
    await patiently(runtime.endpoint("t.c.e").pause())
    await until(lambda: not paused.instance_ids())
    assert other.instance_ids() == [runtime.instance_id]
    assert await patiently(other.call(1)) == 1


async def test_what_is_not_served_here_cannot_be_paused(cluster: Cluster) -> None:
    one, other, client = await Workers(cluster).start()
    for runtime, name in ((cluster.caller, "t.c.e"), (one, "t.c.nothing")):
        endpoint = runtime.endpoint(name)
        for attempt in (endpoint.pause, endpoint.resume):
            with pytest.raises(NotServed, match=f'{attempt.__name__}: this runtime does not serve endpoint "t/comp'):
                await attempt()
    assert sorted(client.instance_ids()) == sorted((one.instance_id, other.instance_id))


async def test_a_runtime_that_stops_stays_out(cluster: Cluster) -> None:
    one, other, client = await Workers(cluster).start()
    await patiently(one.endpoint("t.c.e").pause())
    one.shutdown()
    with pytest.raises(RuntimeClosed, match="resume"):
        await one.endpoint("t.c.e").resume()
    await patiently(one.close())
    assert client.instance_ids() == [other.instance_id]
    with pytest.raises(RuntimeClosed, match="pause"):
        await one.endpoint("t.c.e").pause()


async def test_a_fixed_list_cannot_be_left(cluster: Cluster) -> None:
    worker = cluster.runtime(
        request_plane="direct", discovery="static", listen="tcp://127.0.0.1:0", static="t.c.e=tcp://127.0.0.1:1"
    )

    async def echo(request: Any) -> Any:
        return request

    serving = worker.endpoint("t.c.e").serve_endpoint(echo)
    await until(lambda: serving.done() or serving.registered.done())
    with pytest.raises(DiscoveryError, match="pause: only TRD_STATIC"):
        await worker.endpoint("t.c.e").pause()


async def test_one_that_is_being_registered_cannot_be_paused_yet(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the registration under way would put it back behind the caller's back."""
    worker = cluster.runtime()
    begun, go_on = asyncio.Event(), asyncio.Event()
    register = worker.discovery.register

    async def slow(instance: Any) -> None:
        begun.set()
        await go_on.wait()
        await register(instance)

    async def echo(request: Any) -> Any:
        return request

    monkeypatch.setattr(worker.discovery, "register", slow)
    worker.endpoint("t.c.e").serve_endpoint(echo)
    await patiently(begun.wait())
    try:
        with pytest.raises(NotServed, match="or not yet"):
            await worker.endpoint("t.c.e").pause()
    finally:
        go_on.set()  # or its runtime could not be closed
    client = await cluster.client()
    await patiently(worker.endpoint("t.c.e").pause())
    await until(lambda: not client.instance_ids())
