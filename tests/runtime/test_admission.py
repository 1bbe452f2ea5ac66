"""The queue in front of an endpoint: order, deadlines, and what the refused are told."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.runtime.cluster import Cluster, into, patiently, until
from tests.timing import PATIENCE_S
from triton_distributed.errors import DeadlineExceeded, Overloaded
from triton_distributed.runtime.admission import Admission


class Gate:
    """A handler that notes who came in, and holds each until it is told to go on."""

    def __init__(self) -> None:
        self.began: list[Any] = []
        self.open = asyncio.Semaphore(0)

    async def __call__(self, request: Any) -> Any:
        self.began.append(request)
        await self.open.acquire()
        return request


async def full(cluster: Cluster, **options: Any) -> tuple[Gate, Any]:
    """An endpoint with one place, which "first" has taken."""
    gate = Gate()

    async def handler(request: Any) -> Any:
        return await gate(request)

    client = await cluster.connect(handler, max_inflight=1, **options)
    client.generate("first")
    await until(lambda: gate.began == ["first"])
    return gate, client


async def waiting(cluster: Cluster, count: int) -> None:
    (stats,) = [each for runtime in cluster._runtimes for each in runtime._server.endpoints]
    await until(lambda: len(stats.admission) == count)


async def test_those_with_a_larger_priority_are_let_in_first(cluster: Cluster) -> None:
    gate, client = await full(cluster, max_queue=10)
    calls = []
    for number, (name, priority) in enumerate([("a", 0), ("b", -5), ("c", 7), ("d", 0), ("e", 7)], 1):
        calls.append(asyncio.ensure_future(client.call(name, priority=priority)))
        await waiting(cluster, number)
    for _ in range(6):
        gate.open.release()
    await patiently(asyncio.gather(*calls))
    assert gate.began == ["first", "c", "e", "a", "d", "b"]


async def test_the_least_of_a_full_queue_makes_room(cluster: Cluster) -> None:
    gate, client = await full(cluster, max_queue=2)
    low = asyncio.ensure_future(client.call("low", priority=-1))
    await waiting(cluster, 1)
    later = asyncio.ensure_future(client.call("later", priority=-1))
    await waiting(cluster, 2)
    high = asyncio.ensure_future(client.call("high", priority=1))
    with pytest.raises(Overloaded):
        await patiently(later)
    with pytest.raises(Overloaded):
        await patiently(client.call("equal", priority=-1))
    for _ in range(3):
        gate.open.release()
    assert await patiently(asyncio.gather(low, high)) == ["low", "high"]
    assert gate.began == ["first", "high", "low"]


async def test_a_call_in_a_handler_has_its_requests_priority(cluster: Cluster) -> None:
    async def inner(request: Any, context: Any) -> int:
        return context.priority

    await cluster.worker(inner, "t.c.inner")
    client = await cluster.client("t.c.inner")

    async def outer(request: Any) -> list[int]:
        return [await client.call(None), await client.call(None, priority=1)]

    await cluster.worker(outer, "t.c.outer")
    outside = await cluster.client("t.c.outer")
    assert await patiently(outside.call(None, priority=42)) == [42, 1]
    assert await patiently(outside.call(None)) == [0, 1]


@pytest.mark.parametrize("priority", [128, -129, 1.5, "1", True])
async def test_a_priority_that_is_none_raises_in_the_call(cluster: Cluster, priority: Any) -> None:
    _, client = await full(cluster)
    with pytest.raises((TypeError, ValueError), match="priority="):
        client.generate(1, priority=priority)


async def test_work_that_cannot_be_done_in_time_is_refused_early(cluster: Cluster) -> None:
    gate, client = await full(cluster, max_queue=100)
    (served,) = [each for runtime in cluster._runtimes for each in runtime._server.endpoints]
    served.admission.mean_s = 3600.0  # as if handlers had taken an hour each
    with pytest.raises(Overloaded, match=r"deadline is in .* try again in 3\.6e\+03 s") as caught:
        await patiently(client.call("no", timeout=PATIENCE_S))
    assert caught.value.retry_after_s == 3600.0
    patient = asyncio.ensure_future(client.call("patient"))  # who gives no deadline may wait
    await waiting(cluster, 1)
    gate.open.release()
    gate.open.release()
    assert await patiently(patient) == "patient"
    assert gate.began == ["first", "patient"]
    assert served.admission.mean_s < 3600.0  # it learns


async def test_expired_work_is_dropped_before_it_starts(cluster: Cluster) -> None:
    gate, client = await full(cluster, max_queue=10)
    with pytest.raises(DeadlineExceeded):
        await patiently(client.call("late", timeout=0.02))
    await waiting(cluster, 0)
    gate.open.release()
    gate.open.release()
    assert await patiently(client.call("next")) == "next"
    assert gate.began == ["first", "next"]


async def test_what_is_refused_here_goes_elsewhere(cluster: Cluster) -> None:
    _gate, client = await full(cluster)

    async def free(request: Any) -> Any:
        return f"{request} elsewhere"

    await cluster.worker(free)
    await until(lambda: len(client.instance_ids()) == 2)
    assert await patiently(asyncio.gather(*(client.call(n) for n in range(4)))) == [f"{n} elsewhere" for n in range(4)]
    items: list[Any] = []
    await into(items, client.generate("x", annotated=False))
    assert items == ["x elsewhere"]


def test_the_estimate() -> None:
    admission = Admission(max_inflight=4, max_queue=10)
    assert admission.wait_s(0) == 0.0
    admission.took(2.0)
    assert admission.mean_s == 2.0
    admission.took(1.0)
    assert admission.mean_s == pytest.approx(1.9)
    for number in range(3):
        assert admission.wait_s(0) == pytest.approx((number + 1) * 1.9 / 4)
        assert admission.enter(object(), 0) is None  # type: ignore[arg-type]
    assert admission.wait_s(1) == pytest.approx(1.9 / 4)
    assert len(admission.clear()) == 3
    assert admission.next() is None
