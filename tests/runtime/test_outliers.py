"""Instances that fail far more than their peers: which are left out, for how long, and which never are."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest

from tests.runtime.cluster import Cluster, patiently, until
from tests.runtime.fakes import FakeWorker, accepts_then_drops
from tests.timing import MS, PATIENCE_S
from triton_distributed.calling import ejection
from triton_distributed.errors import DeadlineExceeded, InvalidRequest, StreamIncomplete
from triton_distributed.names import Instance
from triton_distributed.routing.load import LoadBook
from triton_distributed.runtime import Client, DistributedRuntime

FOR_EVER_S = 3600.0


class Behaviour:
    """A worker's handler, which does what a test says, and counts."""

    def __init__(self) -> None:
        self.calls = 0
        self.error: BaseException | None = None
        self.gate: asyncio.Event | None = None

    async def __call__(self, request: Any) -> Any:
        self.calls += 1
        if self.error is not None:
            raise type(self.error)(*self.error.args)  # one object would collect a traceback of all calls
        if self.gate is not None:
            await self.gate.wait()
        return self.calls


class Workers:
    """Some workers of one endpoint and a client."""

    def __init__(self, cluster: Cluster, caller: DistributedRuntime) -> None:
        self._cluster, self._caller = cluster, caller
        self.behaviours: list[Behaviour] = []
        self.ids: list[int] = []
        self.client: Client

    async def start(self, count: int, **options: Any) -> Workers:
        for _ in range(count):
            behaviour = Behaviour()
            worker = await self._cluster.worker(behaviour.__call__, **options)
            self.behaviours.append(behaviour)
            self.ids.append(worker.instance_id)
        self.client = await self._caller.endpoint("t.c.e").client()
        await until(lambda: len(self.client.instance_ids()) == count)
        return self

    async def answer(self, count: int, *places: int) -> None:
        """So many calls to each of these workers, which answer."""
        for place in places:
            for _ in range(count):
                await patiently(self.client.direct(0, self.ids[place], annotated=False).__anext__())

    async def calls_until_out(self, place: int) -> None:
        """Call on, as clients do, until this one is left out."""
        async with asyncio.timeout(PATIENCE_S):
            while self.out != {place}:
                await outcomes([self.client.call(n) for n in range(9)])

    @property
    def out(self) -> set[int]:
        """The places of those that are ejected."""
        return {self.ids.index(each) for each in self.client.candidates.ejector.outliers.ejected}


async def outcomes(calls: list[Any]) -> list[Any]:
    return await patiently(asyncio.gather(*calls, return_exceptions=True))


@pytest.fixture
async def three(cluster: Cluster) -> Workers:
    """Three workers, and a client that leaves out for longer than the test takes."""
    return await Workers(cluster, cluster.runtime(ejection_s=FOR_EVER_S)).start(3)


# --- failures --------------------------------------------------------------------------------------------------------


async def test_a_worker_that_always_fails_is_left_out_soon(three: Workers, caplog: pytest.LogCaptureFixture) -> None:
    bad, client = three.behaviours[1], three.client
    bad.error = RuntimeError("no memory left on the device")
    with caplog.at_level(logging.WARNING, logger="triton_distributed.runtime"):
        await three.calls_until_out(1)
        calls = bad.calls
        assert calls <= 30
        assert not [each for each in await outcomes([client.call(n) for n in range(90)]) if isinstance(each, Exception)]
    assert bad.calls == calls
    assert [each.id for each in client.candidates.instances] == [
        each for each in sorted(three.ids) if each != three.ids[1]
    ]
    assert (client.outlier_stats.ejections, client.outlier_stats.out) == (1, 1)
    assert "3 instances (1 ejected)" in repr(client)
    (record,) = [each for each in caplog.records if "left out" in each.getMessage()]
    assert f'"t.c.e": instance {three.ids[1]} is left out for ' in record.getMessage()
    assert " calls failed, of its peers' 0 of " in record.getMessage()


async def test_one_after_the_other_few_calls_fail(three: Workers) -> None:
    three.behaviours[2].error = OSError("disk")
    failed = 0
    for n in range(120):
        try:
            await patiently(three.client.call(n))
        except OSError:
            failed += 1
    assert three.out == {2}
    assert failed == three.behaviours[2].calls <= 20


async def test_it_can_still_be_called_by_its_id(three: Workers) -> None:
    three.behaviours[0].error = RuntimeError()
    await three.calls_until_out(0)
    three.behaviours[0].error = None
    calls = three.behaviours[0].calls
    await three.answer(3, 0)
    assert three.behaviours[0].calls == calls + 3
    assert three.out == {0}


async def test_it_comes_back_and_stays_while_it_is_good(cluster: Cluster, caplog: pytest.LogCaptureFixture) -> None:
    workers = await Workers(cluster, cluster.runtime(ejection_s=200 * MS)).start(3)
    bad, client = workers.behaviours[1], workers.client
    bad.error = RuntimeError()
    with caplog.at_level(logging.INFO, logger="triton_distributed.runtime"):
        await workers.calls_until_out(1)
        bad.error = None
        await until(lambda: not workers.out)
    assert f"back in rotation: instance {workers.ids[1]}" in caplog.text
    calls = bad.calls
    await outcomes([client.call(n) for n in range(90)])
    assert bad.calls == calls + 30
    assert (client.outlier_stats.ejections, client.outlier_stats.out) == (1, 0)
    bad.error = RuntimeError()
    await workers.calls_until_out(1)
    (again,) = client.candidates.ejector.outliers.ejected.values()
    assert again.until - again.since >= 100 * MS


async def test_one_that_is_gone_is_forgotten(cluster: Cluster) -> None:
    workers = await Workers(cluster, cluster.runtime(ejection_s=FOR_EVER_S)).start(2)
    bad, client = Behaviour(), workers.client
    bad.error = RuntimeError()
    worker = await cluster.worker(bad.__call__)
    workers.ids.append(worker.instance_id)
    await until(lambda: len(client.instance_ids()) == 3)
    await workers.calls_until_out(2)
    assert client.outlier_stats.out == 1
    await worker.close()
    await until(lambda: len(client.instance_ids()) == 2)
    assert client.outlier_stats.out == 0
    assert not client.candidates.ejector.outliers.ejected


async def test_where_all_fail_no_instance_is_left_out(three: Workers) -> None:
    for each in three.behaviours:
        each.error = KeyError("every request is bad")
    found: list[Any] = []
    for _ in range(10):
        found += await outcomes([three.client.call(n) for n in range(30)])
    assert all(isinstance(each, KeyError) for each in found)
    assert [each.calls for each in three.behaviours] == [100] * 3
    assert three.client.outlier_stats.ejections == 0


async def test_of_two_at_most_one_is_left_out(cluster: Cluster) -> None:
    two = await Workers(cluster, cluster.runtime(ejection_s=FOR_EVER_S)).start(2)
    two.behaviours[0].error = RuntimeError()
    await two.calls_until_out(0)
    two.behaviours[1].error = RuntimeError()
    two.behaviours[0].error = None
    await outcomes([two.client.call(n) for n in range(200)])
    assert two.behaviours[1].calls >= 200
    assert two.out == {0}


async def test_when_the_others_are_gone_it_is_called(cluster: Cluster) -> None:
    caller = cluster.runtime(ejection_s=FOR_EVER_S)
    workers = await Workers(cluster, caller).start(1)
    other = await cluster.worker(workers.behaviours[0].__call__)
    bad = Behaviour()
    bad.error = RuntimeError()
    ejected = await cluster.worker(bad.__call__)
    client = workers.client
    await until(lambda: len(client.instance_ids()) == 3)
    workers.ids.append(ejected.instance_id)
    await workers.calls_until_out(1)
    bad.error = None
    await other.close()
    for endpoint in list(client.candidates.table.by_id.values()):
        if endpoint.id not in (ejected.instance_id, other.instance_id):
            client.candidates.mark_down(endpoint.addresses)
    await until(lambda: len(client.instance_ids()) == 2)
    calls = bad.calls
    client.candidates.ejector.outliers.forget({ejected.instance_id})  # nothing else is known of the others
    assert [each.id for each in client.candidates.instances] == [ejected.instance_id]
    await patiently(client.call(1))
    assert bad.calls == calls + 1


async def test_a_deadline_counts_against_the_worker_that_had_all_of_the_time(three: Workers) -> None:
    await three.answer(1, 0)  # it is connected: no time goes by before the request is sent
    gate = three.behaviours[0].gate = asyncio.Event()

    async def too_late() -> None:
        with pytest.raises(DeadlineExceeded):
            await three.client.direct(0, three.ids[0], annotated=False, timeout=20 * MS).__anext__()

    await too_late()
    await three.answer(10, 1, 2)
    for _ in range(4):
        assert not three.out
        await too_late()
    assert three.out == {0}
    gate.set()


async def test_a_deadline_does_not_count_where_others_used_the_time_up(cluster: Cluster) -> None:
    caller = cluster.runtime(ejection_s=FOR_EVER_S)
    workers = await Workers(cluster, caller).start(2)
    full = Behaviour()
    full.gate = workers.behaviours[0].gate = asyncio.Event()
    refusing = await cluster.worker(full.__call__, max_inflight=1, max_queue=0)
    client = workers.client
    await until(lambda: len(client.instance_ids()) == 3)
    held = client.direct(0, refusing.instance_id)
    await until(lambda: full.calls)

    def first_the_full_one(request: Any, instances: tuple[Instance, ...], load: LoadBook) -> Instance:
        by_id = {each.id: each for each in instances}
        return by_id.get(refusing.instance_id) or by_id[workers.ids[0]]

    found = await outcomes([client.call(n, policy=first_the_full_one, timeout=300 * MS) for n in range(20)])
    assert all(isinstance(each, DeadlineExceeded) for each in found)
    assert workers.behaviours[0].calls == 20, "refused by one, given to the other"
    full.gate.set()
    await held.aclose()
    assert nothing_failed(client)


# --- what does not count -----------------------------------------------------------------------------------------------


async def test_bad_requests_do_not_count(three: Workers) -> None:
    three.behaviours[0].error = InvalidRequest("", "no such model")
    found = await outcomes([three.client.call(n) for n in range(90)])
    assert sum(isinstance(each, InvalidRequest) for each in found) == 30
    assert nothing_failed(three.client)


async def test_refusals_do_not_count(cluster: Cluster) -> None:
    workers = await Workers(cluster, cluster.runtime(ejection_s=FOR_EVER_S)).start(3, max_inflight=1, max_queue=0)
    gate = workers.behaviours[0].gate = asyncio.Event()
    held = workers.client.direct(0, workers.ids[0])
    await until(lambda: workers.behaviours[0].calls)
    for n in range(60):
        await patiently(workers.client.call(n))  # by others where this one refuses
    assert workers.behaviours[0].calls == 1
    assert nothing_failed(workers.client)
    gate.set()
    await held.aclose()


async def test_calls_that_were_cancelled_do_not_count_as_failed(three: Workers) -> None:
    gate = three.behaviours[0].gate = asyncio.Event()
    for n in range(40):
        stream = three.client.direct(n, three.ids[0])
        await stream
        await stream.aclose()
    assert nothing_failed(three.client)
    gate.set()


async def test_of_two_workers_the_one_that_loses_its_connections_is_left_out(cluster: Cluster) -> None:
    two = await Workers(cluster, cluster.runtime(ejection_s=FOR_EVER_S)).start(2)
    ejector = two.client.candidates.ejector
    two.behaviours[0].error = RuntimeError("counting begins")
    await outcomes([two.client.direct(0, two.ids[0], annotated=False).__anext__()])
    two.behaviours[0].error = None
    await two.answer(40, 1)
    two.client.candidates.mark_down(two.client.candidates.table.by_id[two.ids[0]].addresses)
    for cause in range(20):  # each a lost connection, while the worker is out of rotation
        ejector.failed(two.ids[0], cause + 1)
    assert two.out == {0}


async def test_one_lost_connection_is_one_failure(three: Workers) -> None:
    gate = three.behaviours[0].gate = asyncio.Event()
    client = three.client
    calls = [asyncio.ensure_future(client.direct(n, three.ids[0]).__anext__()) for n in range(64)]
    await until(lambda: three.behaviours[0].calls == 64)
    session = client.pool.get(client.candidates.table.by_id[three.ids[0]].addresses)
    assert session is not None
    await until(lambda: all(each.accepted for each in session.streams.values()))
    assert session._transport is not None
    session._transport.abort()
    assert all(isinstance(each, StreamIncomplete) for each in await outcomes(calls))
    await until(lambda: not client.candidates.rotation.down)
    await three.answer(10, 1, 2)
    gate.set()
    three.behaviours[0].error = RuntimeError()
    for n in range(4):
        assert not three.out
        await outcomes([client.direct(n, three.ids[0]).__anext__()])
    assert three.out == {0}


# --- attribution -----------------------------------------------------------------------------------------------------


async def test_a_worker_that_loses_its_calls_is_left_out_though_others_answer_them(cluster: Cluster) -> None:
    workers = await Workers(cluster, cluster.runtime(ejection_s=FOR_EVER_S)).start(2)
    fake = await FakeWorker(accepts_then_drops).start(5)
    client = workers.client
    await until(lambda: len(client.instance_ids()) == 3)

    async def calls() -> None:
        while not client.candidates.ejector.outliers.ejected:
            assert await client.call(1, idempotent=True) > 0

    await patiently(calls())
    assert set(client.candidates.ejector.outliers.ejected) == {5}
    assert not client.stats.ended[6], "no call was lost"
    assert client.outlier_stats.ejections == 1
    await fake.close()


# --- slow instances ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["p2c", "least_loaded"])
async def test_a_worker_that_does_not_answer_is_avoided_by_policies_that_look_at_load(
    three: Workers, policy: str
) -> None:
    gate = three.behaviours[2].gate = asyncio.Event()
    held = three.client.direct(0, three.ids[2])
    await until(lambda: three.behaviours[2].calls)
    for n in range(60):
        await patiently(three.client.call(n, policy=policy))
    assert three.behaviours[2].calls == 1
    assert three.client.outlier_stats.ejections == 0, "slowness is no failure"
    gate.set()
    await held.aclose()


# --- where there is nothing to do ----------------------------------------------------------------------------------------


async def test_it_can_be_switched_off(cluster: Cluster) -> None:
    workers = await Workers(cluster, cluster.runtime(ejection_s=0.0)).start(3)
    workers.behaviours[0].error = RuntimeError()
    await outcomes([workers.client.call(n) for n in range(300)])
    assert workers.behaviours[0].calls == 100
    assert nothing_failed(workers.client)


async def test_a_single_instance_needs_nothing(cluster: Cluster) -> None:
    workers = await Workers(cluster, cluster.runtime()).start(1)
    workers.behaviours[0].error = RuntimeError()
    await outcomes([workers.client.call(n) for n in range(100)])
    assert nothing_failed(workers.client)


@pytest.mark.any_loop
async def test_answers_are_counted_for_a_while_after_a_failure_only(
    three: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ejection, "PERIOD_S", 20 * MS)
    await three.answer(10, 0, 1, 2)
    assert nothing_failed(three.client)
    three.behaviours[0].error = InvalidRequest("", "no such model")
    await outcomes([three.client.direct(0, three.ids[0]).__anext__()])
    assert nothing_failed(three.client)
    three.behaviours[0].error = RuntimeError()
    await outcomes([three.client.direct(0, three.ids[0]).__anext__()])
    assert not nothing_failed(three.client)
    await until(lambda: nothing_failed(three.client))


async def test_a_closed_runtime_leaves_no_timer(cluster: Cluster) -> None:
    caller = cluster.runtime(ejection_s=FOR_EVER_S)
    workers = await Workers(cluster, caller).start(3)
    workers.behaviours[0].error = RuntimeError()
    await workers.calls_until_out(0)
    ejector = workers.client.candidates.ejector
    timers = ejector._period, ejector._return
    await caller.close()
    assert all(each is not None and each.cancelled() for each in timers)
    ejector.failed(workers.ids[1])
    assert nothing_failed(workers.client)


def nothing_failed(client: Client) -> bool:
    """Whether no failure counts at present."""
    ejector = client.candidates.ejector
    return not ejector.counting and ejector._period is None
