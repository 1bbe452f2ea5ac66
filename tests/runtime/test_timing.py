"""`stream.timing()` says where the time of a call went, and the worker's histograms count the same."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.runtime.cluster import Cluster, drained, patiently, until
from triton_distributed.errors import Overloaded
from triton_distributed.observe.stats import SHORT_S
from triton_distributed.serving import endpoint as serving


@pytest.fixture(autouse=True)
def all_times_are_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "TIMES_FROM_S", 0.0)


async def test_the_parts_make_up_the_whole(cluster: Cluster) -> None:
    async def answer(request: int) -> Any:
        for number in range(request):
            yield number
            await asyncio.sleep(0.001)

    client = await cluster.connect(answer)
    stream = client.generate(3)
    before = stream.timing()
    assert (before.network_s, before.handler_s, before.first_item_s) == (None, None, None)
    await patiently(drained(stream))
    timing = stream.timing()
    assert timing == stream.timing()  # It is over, so nothing changes.
    parts = [timing.client_queue_s, timing.network_s, timing.worker_queue_s, timing.loop_wait_s, timing.handler_s]
    assert timing.reader_s == 0
    assert sum(each or 0 for each in parts) == pytest.approx(timing.total_s, abs=1e-5)
    assert timing.handler_s is not None
    assert timing.first_item_s is not None
    assert 0.003 <= timing.handler_s <= timing.total_s
    assert 0 < timing.first_item_s <= timing.total_s
    assert "handler" in str(timing)


async def test_a_request_waits_for_a_place_and_then_for_its_reader(cluster: Cluster) -> None:
    free = asyncio.Event()

    async def answer(request: str) -> Any:
        if request == "first":
            await free.wait()
            yield request
        else:
            while True:
                yield bytes(30_000)
                if len(sent) > 20:
                    return
                sent.append(1)

    sent: list[int] = []
    worker = cluster.runtime(window_bytes=65536)
    await cluster.serve(worker, answer, max_inflight=1, max_queue=1)
    client = await cluster.client()
    first = client.generate("first")
    await until(lambda: worker.statistics().endpoints[0].running)
    second = client.generate("second")
    await until(lambda: worker.statistics().endpoints[0].waiting)
    await until(lambda: min(each.age_s for each in worker.requests()) > 2 * SHORT_S)  # A shorter wait counts as none.
    free.set()
    await patiently(drained(first))
    await until(lambda: worker.requests() and worker.requests()[0].blocked)
    assert worker.requests()[0].age_s > 0
    await patiently(drained(second))
    timing = second.timing()
    assert timing.worker_queue_s is not None
    assert timing.reader_s is not None
    assert timing.worker_queue_s > 0
    assert timing.reader_s > 0
    (endpoint,) = worker.statistics().endpoints
    for histogram in (endpoint.duration, endpoint.first_item, endpoint.queue_wait, endpoint.loop_wait):
        assert sum(histogram.counts) == 2
    assert endpoint.queue_wait.total_s == pytest.approx(timing.worker_queue_s, abs=1e-4)


async def test_calls_and_requests_are_timed_however_they_end(cluster: Cluster) -> None:
    async def answer(request: str) -> Any:
        if request == "fail":
            raise ValueError("no")
        if request == "wait":
            await asyncio.Event().wait()
        return request

    worker = cluster.runtime()
    await cluster.serve(worker, answer)
    client = await cluster.client()
    assert await patiently(client.call("good")) == "good"
    failed = client.generate("fail")
    with pytest.raises(ValueError, match="no"):
        await patiently(drained(failed))
    assert failed.timing().handler_s is None
    left = client.generate("wait")
    await until(lambda: any(each.running for each in worker.statistics().endpoints))
    left.cancel()
    await until(lambda: not worker.statistics().endpoints[0].running)
    (endpoint,), (calls,) = worker.statistics().endpoints, cluster.caller.statistics().calls
    assert (sum(endpoint.duration.counts), sum(endpoint.first_item.counts)) == (3, 1)
    assert (sum(calls.duration.counts), sum(calls.first_item.counts)) == (3, 1)
    assert calls.outcomes["error"] == calls.outcomes["cancelled"] == calls.outcomes["ok"] == 1


async def test_retries_and_bytes_are_counted(cluster: Cluster) -> None:
    async def hold(request: int) -> Any:
        await asyncio.Event().wait()

    for _ in range(2):
        await cluster.serve(cluster.runtime(), hold, max_inflight=1, max_queue=0)
    client = await cluster.client()
    holding = [client.generate(1, policy="round_robin") for _ in range(2)]
    for each in holding:
        await patiently(each.accepted())
    (before,) = cluster.caller.statistics().calls
    with pytest.raises(Overloaded):
        await patiently(drained(client.generate(2)))
    statistics = cluster.caller.statistics()
    (calls,) = statistics.calls
    assert (calls.retries, calls.resumes, calls.hedges) == (before.retries + 1, 0, 0)
    assert statistics.sent_bytes > 0
    assert statistics.received_bytes > 0
