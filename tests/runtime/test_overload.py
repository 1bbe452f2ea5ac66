"""Limits of an endpoint: what runs, what waits, what is refused and goes elsewhere."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.runtime.cluster import Cluster, drained, patiently, until
from triton_distributed.errors import Overloaded


class Gate:
    """A handler that notes who begins, and waits until it is opened."""

    def __init__(self, name: str = "gate") -> None:
        self.name = name
        self.began: list[Any] = []
        self.running = self.most = 0
        self.opened = asyncio.Event()

    async def __call__(self, request: Any) -> Any:
        self.began.append(request)
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await self.opened.wait()
            return (self.name, request)
        finally:
            self.running -= 1


@pytest.mark.any_loop
async def test_beyond_its_limits_an_endpoint_refuses_at_once(cluster: Cluster) -> None:
    gate = Gate()
    worker = await cluster.worker(gate, max_inflight=2, max_queue=3)
    client = await cluster.client()
    calls = [asyncio.create_task(client.call(n)) for n in range(5)]
    await until(lambda: len(gate.began) == 2)
    for attempt in (lambda: client.call("one more"), lambda: drained(client.generate("one more"))):
        with pytest.raises(Overloaded, match="max_inflight=2, max_queue=3") as caught:
            await patiently(attempt())
        assert caught.value.instance_id == worker.instance_id
        assert "t/components/c/e" in str(caught.value)
    gate.opened.set()
    assert await patiently(asyncio.gather(*calls)) == [["gate", n] for n in range(5)]
    assert gate.most == 2
    assert gate.began == list(range(5))  # in the order in which they came
    assert worker.stats()["t/components/c/e"].outcomes()["refused"] == 2
    assert await patiently(client.call("later")) == ["gate", "later"]
    assert len(client.load) == 0


async def test_without_a_queue_nothing_waits(cluster: Cluster) -> None:
    gate = Gate()
    client = await cluster.connect(gate, max_inflight=1)
    first = asyncio.create_task(client.call(1))
    await until(lambda: gate.began)
    with pytest.raises(Overloaded):
        await patiently(client.call(2))
    gate.opened.set()
    await patiently(first)


@pytest.mark.any_loop
async def test_a_refused_request_goes_to_another_instance_and_ends_well(cluster: Cluster) -> None:
    full, free = Gate("full"), Gate("free")
    free.opened.set()
    await cluster.worker(full, max_inflight=1)
    client = await cluster.client()
    first = asyncio.create_task(client.call("first"))
    await until(lambda: full.began)
    await cluster.worker(free)
    await until(lambda: len(client.instance_ids()) == 2)
    for n in range(6):
        assert await patiently(client.call(n)) == ["free", n]
        assert await patiently(drained(client.generate(n, annotated=False))) == [["free", n]]
        assert await patiently(drained(client.random(n, annotated=False))) == [["free", n]]
        large = "x" * 200_000
        assert await patiently(client.call(large)) == ["free", large]
    assert full.began == ["first"]
    full.opened.set()
    await patiently(first)
    assert client.stats.outcomes() == {**dict.fromkeys(client.stats.outcomes(), 0), "ok": 25}


async def test_when_all_are_full_the_error_counts_them(cluster: Cluster) -> None:
    gates = [Gate(str(n)) for n in range(3)]
    for gate in gates:
        await cluster.worker(gate, max_inflight=1)
    client = await cluster.client()
    for instance in client.instance_ids():
        client.direct("hold", instance)
    await until(lambda: all(gate.began for gate in gates))
    with pytest.raises(Overloaded, match="3 instances were tried"):
        await patiently(client.call(1))
    for gate in gates:
        gate.opened.set()
    await until(lambda: not client.stats.inflight)


async def test_where_one_is_full_and_another_drains_the_caller_may_come_back(cluster: Cluster) -> None:
    gates = [Gate("full"), Gate("draining")]
    full = await cluster.worker(gates[0], max_inflight=1)
    draining = await cluster.worker(gates[1], max_inflight=1, max_queue=1)

    def full_first(request: Any, instances: Any, load: Any) -> Any:
        return next((each for each in instances if each.id == full.instance_id), instances[0])

    client = await cluster.client(policy=full_first)
    await until(lambda: len(client.instance_ids()) == 2)
    calls = [asyncio.create_task(client.call(n)) for n in range(2)]
    await until(lambda: all(each.began for each in gates))
    waits = asyncio.create_task(client.call("waits"))
    await until(lambda: draining.statistics().endpoints[0].waiting == 1)
    draining.shutdown()
    with pytest.raises(Overloaded, match="2 instances were tried") as caught:
        await patiently(waits)
    assert caught.value.instance_id == full.instance_id
    for gate in gates:
        gate.opened.set()
    await patiently(asyncio.gather(*calls))


async def test_direct_is_refused_by_the_one_that_is_named(cluster: Cluster) -> None:
    gate, free = Gate(), Gate("free")
    free.opened.set()
    full = await cluster.worker(gate, max_inflight=1)
    client = await cluster.client()
    first = asyncio.create_task(client.call(1))
    await until(lambda: gate.began)
    await cluster.worker(free)
    with pytest.raises(Overloaded):
        await patiently(drained(client.direct(2, full.instance_id)))
    gate.opened.set()
    await patiently(first)


async def test_a_request_that_leaves_the_queue_makes_room(cluster: Cluster) -> None:
    gate = Gate()
    worker = await cluster.worker(gate, max_inflight=1, max_queue=1)
    client = await cluster.client()
    first = asyncio.create_task(client.call("first"))
    await until(lambda: gate.began)
    second = asyncio.create_task(client.call("second"))
    await until(lambda: worker.statistics().endpoints[0].waiting)
    second.cancel()
    await until(lambda: not worker.statistics().endpoints[0].waiting)
    third = asyncio.create_task(client.call("third"))
    await until(lambda: worker.statistics().endpoints[0].waiting)
    gate.opened.set()
    assert await patiently(third) == ["gate", "third"]
    await patiently(first)
    assert gate.began == ["first", "third"]


async def test_a_handler_that_fails_makes_room(cluster: Cluster) -> None:
    async def handler(request: Any) -> None:
        raise KeyError(request)

    client = await cluster.connect(handler, max_inflight=1, max_queue=100)
    results = await patiently(asyncio.gather(*[client.call(n) for n in range(50)], return_exceptions=True))
    assert all(isinstance(each, KeyError) for each in results)


async def test_endpoints_of_one_worker_have_their_own_limits(cluster: Cluster) -> None:
    gate, other = Gate(), Gate("other")
    other.opened.set()
    worker = await cluster.worker(gate, max_inflight=1)
    await cluster.serve(worker, other, "t.c.other", max_inflight=1)
    client = await cluster.client()
    first = asyncio.create_task(client.call(1))
    await until(lambda: gate.began)
    assert await patiently((await cluster.client("t.c.other")).call(2)) == ["other", 2]
    gate.opened.set()
    await patiently(first)
