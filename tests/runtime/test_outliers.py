"""Instances that fail or are slow far beyond their peers: who is left out, for how long, and who never is."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
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
LOOKS_S = 20 * MS


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks in quick succession."""
    monkeypatch.setattr(ejection, "LOOK_S", LOOKS_S)


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

    async def compared(self, *good: int) -> None:
        """The others answer, and then all that is known of them is compared; needs `often`."""
        await self.answer(20, *good)
        await until(lambda: self.client.view.ejector._timer is None)

    @property
    def out(self) -> set[int]:
        """The places of those that are ejected."""
        return {self.ids.index(each) for each in self.client.view.ejector.outliers.ejected}


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
    assert [each.id for each in client.view.candidates] == [each for each in sorted(three.ids) if each != three.ids[1]]
    assert (client.outlier_stats.ejections, client.outlier_stats.out) == (1, 1)
    assert "3 instances (1 ejected)" in repr(client)
    (record,) = [each for each in caplog.records if "left out" in each.getMessage()]
    assert f'"t/components/c/e": instance {three.ids[1]} is left out for ' in record.getMessage()
    assert " calls failed, of its peers' 0 of " in record.getMessage()


async def test_failures_that_come_before_any_answer_are_looked_at_again(
    three: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ejection, "LOOK_S", FOR_EVER_S)  # it must not wait for the look at all
    three.behaviours[0].error = RuntimeError()
    gate = three.behaviours[1].gate = three.behaviours[2].gate = asyncio.Event()
    calls = [asyncio.ensure_future(three.client.call(n)) for n in range(90)]
    await until(lambda: sum(each.done() for each in calls) == 30)
    gate.set()
    await outcomes(calls)
    await until(lambda: three.out == {0})


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


async def test_it_comes_back_and_stays_while_it_is_good(
    cluster: Cluster, often: None, caplog: pytest.LogCaptureFixture
) -> None:
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
    (again,) = client.view.ejector.outliers.ejected.values()
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
    assert not client.view.ejector.outliers.ejected
    assert worker.instance_id not in client.view.ejector.outliers.answered


async def test_where_all_fail_nobody_is_left_out(three: Workers, often: None) -> None:
    for each in three.behaviours:
        each.error = KeyError("every request is bad")
    found: list[Any] = []
    for _ in range(10):
        found += await outcomes([three.client.call(n) for n in range(30)])
    assert all(isinstance(each, KeyError) for each in found)
    assert [each.calls for each in three.behaviours] == [100] * 3
    assert three.client.outlier_stats.ejections == 0


async def test_of_two_at_most_one_is_left_out(cluster: Cluster, often: None) -> None:
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
    for endpoint in list(client.view.table.by_id.values()):
        if endpoint.id not in (ejected.instance_id, other.instance_id):
            client.view.mark_down(endpoint.addresses)
    await until(lambda: len(client.instance_ids()) == 2)
    calls = bad.calls
    client.view.ejector.outliers.forget({ejected.instance_id})  # nothing else is known of the others
    assert [each.id for each in client.view.candidates] == [ejected.instance_id]
    await patiently(client.call(1))
    assert bad.calls == calls + 1


async def test_a_deadline_counts_against_the_worker_that_had_all_of_the_time(three: Workers) -> None:
    await three.answer(1, 0)  # it is connected: no time goes by before the request is sent
    gate = three.behaviours[0].gate = asyncio.Event()
    direct = three.client.direct
    found = await outcomes([direct(n, three.ids[0], annotated=False, timeout=20 * MS).__anext__() for n in range(20)])
    assert all(isinstance(each, DeadlineExceeded) for each in found)
    await three.answer(10, 1, 2)
    await until(lambda: three.out == {0})
    gate.set()


async def test_a_deadline_does_not_count_where_others_used_the_time_up(cluster: Cluster, often: None) -> None:
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
    await workers.compared(1)
    assert client.outlier_stats.ejections == 0


# --- what does not count -----------------------------------------------------------------------------------------------


async def test_bad_requests_do_not_count(three: Workers, often: None) -> None:
    three.behaviours[0].error = InvalidRequest("", "no such model")
    found = await outcomes([three.client.call(n) for n in range(90)])
    assert sum(isinstance(each, InvalidRequest) for each in found) == 30
    await three.compared(1, 2)
    assert three.client.outlier_stats.ejections == 0


async def test_refusals_do_not_count(cluster: Cluster) -> None:
    workers = await Workers(cluster, cluster.runtime(ejection_s=FOR_EVER_S)).start(3, max_inflight=1, max_queue=0)
    gate = workers.behaviours[0].gate = asyncio.Event()
    held = workers.client.direct(0, workers.ids[0])
    await until(lambda: workers.behaviours[0].calls)
    for n in range(60):
        await patiently(workers.client.call(n))  # by others where this one refuses
    assert workers.behaviours[0].calls == 1
    assert workers.client.outlier_stats.ejections == 0
    gate.set()
    await held.aclose()


async def test_calls_that_were_cancelled_do_not_count_as_failed(three: Workers, often: None) -> None:
    gate = three.behaviours[0].gate = asyncio.Event()
    ejector = three.client.view.ejector
    timed = 0
    await three.answer(1, 1, 2)
    for n in range(40):
        stream = three.client.direct(n, three.ids[0])
        await stream
        timed += len(ejector._waiting)
        await stream.aclose()
    assert timed >= 20
    assert not ejector._waiting, "nothing is kept of calls that are over"
    await three.compared(1, 2)
    assert three.client.outlier_stats.ejections == 0
    gate.set()


async def test_one_lost_connection_does_not_eject(three: Workers, often: None) -> None:
    gate = three.behaviours[0].gate = asyncio.Event()
    client = three.client
    calls = [asyncio.ensure_future(client.direct(n, three.ids[0]).__anext__()) for n in range(64)]
    await until(lambda: three.behaviours[0].calls == 64)
    session = client.pool.get(client.view.table.by_id[three.ids[0]].addresses)
    assert session is not None
    await until(lambda: all(each.accepted for each in session.streams.values()))
    session._transport.abort()
    assert all(isinstance(each, StreamIncomplete) for each in await outcomes(calls))
    await until(lambda: not client.view.rotation.down)
    await three.compared(1, 2)
    assert client.outlier_stats.ejections == 0
    gate.set()


# --- attribution -----------------------------------------------------------------------------------------------------


async def test_a_worker_that_loses_its_calls_is_left_out_though_others_answer_them(cluster: Cluster) -> None:
    workers = await Workers(cluster, cluster.runtime(ejection_s=FOR_EVER_S)).start(2)
    fake = await FakeWorker(accepts_then_drops).start(5)
    client = workers.client
    await until(lambda: len(client.instance_ids()) == 3)

    async def calls() -> None:
        while not client.view.ejector.outliers.ejected:
            assert await client.call(1, idempotent=True) > 0

    await patiently(calls())
    assert set(client.view.ejector.outliers.ejected) == {5}
    assert not client.stats.ended[6], "no call was lost"
    assert client.outlier_stats.ejections == 1
    await fake.close()


# --- times -----------------------------------------------------------------------------------------------------------


async def test_a_worker_that_does_not_answer_any_more_is_left_out(three: Workers, often: None) -> None:
    gate = three.behaviours[2].gate = asyncio.Event()
    client, held, before = three.client, [], three.behaviours[2].calls

    async def call(n: int) -> None:
        try:
            await client.call(n)
        except BaseException as error:
            held.append(error)
            raise

    calls: list[asyncio.Future[None]] = []

    async def until_it_is_out() -> None:
        while not three.out:
            calls.extend(asyncio.ensure_future(call(n)) for n in range(3))
            await asyncio.sleep(0.002)

    await patiently(until_it_is_out())
    assert three.out == {2}
    # What was sent to it before has arrived; all else is answered.
    await until(lambda: sum(not each.done() for each in calls) == three.behaviours[2].calls - before)
    asked = three.behaviours[2].calls
    await outcomes([client.call(n) for n in range(60)])
    assert three.behaviours[2].calls == asked
    gate.set()
    await outcomes(calls)
    assert not held, "those that it had were answered when it could"


async def test_slow_in_the_middle_of_streams_is_nothing_to_compare(cluster: Cluster, often: None) -> None:
    caller = cluster.runtime(ejection_s=FOR_EVER_S)
    gate = asyncio.Event()

    async def first_then_wait(request: Any) -> AsyncIterator[int]:
        yield 1
        await gate.wait()
        yield 2

    async def both(request: Any) -> AsyncIterator[int]:
        yield 1
        yield 2

    waits = await cluster.worker(first_then_wait)
    for _ in range(2):
        await cluster.worker(both)
    client = await caller.endpoint("t.c.e").client()
    await until(lambda: len(client.instance_ids()) == 3)
    streams = [client.generate(n, annotated=False) for n in range(120)]
    assert [await patiently(anext(each)) for each in streams] == [1] * 120
    rest = [each for each in streams if each.instance_id != waits.instance_id]
    assert [await patiently(anext(each)) for each in rest] == [2] * 80
    looks = asyncio.get_running_loop().time() + 10 * LOOKS_S
    await until(lambda: asyncio.get_running_loop().time() > looks)
    assert client.outlier_stats.ejections == 0
    gate.set()
    for each in streams:
        await each.aclose()


# --- where there is nothing to do ----------------------------------------------------------------------------------------


async def test_it_can_be_switched_off(cluster: Cluster) -> None:
    workers = await Workers(cluster, cluster.runtime(ejection_s=0.0)).start(3)
    workers.behaviours[0].error = RuntimeError()
    await outcomes([workers.client.call(n) for n in range(300)])
    assert workers.behaviours[0].calls == 100
    assert workers.client.outlier_stats.ejections == 0
    assert idle(workers.client)()


async def test_a_single_instance_needs_nothing(cluster: Cluster) -> None:
    workers = await Workers(cluster, cluster.runtime()).start(1)
    await outcomes([workers.client.call(n) for n in range(100)])
    workers.behaviours[0].error = RuntimeError()
    await outcomes([workers.client.call(n) for n in range(100)])
    assert idle(workers.client)()
    assert workers.client.view.ejector.samples == 0


@pytest.mark.any_loop
async def test_the_timer_ends_with_the_calls(three: Workers, often: None) -> None:
    for each in three.behaviours:
        each.gate = asyncio.Event()
    calls = [asyncio.ensure_future(three.client.call(n)) for n in range(300)]
    await until(lambda: sum(each.calls for each in three.behaviours) == 300)
    assert not idle(three.client)(), "some of them are timed"
    for each in three.behaviours:
        assert each.gate is not None
        each.gate.set()
    await outcomes(calls)
    await until(idle(three.client))
    assert three.client.view.ejector.samples > 0, "the next calls are timed again"
    three.behaviours[0].error = RuntimeError()
    await three.calls_until_out(0)
    await until(lambda: three.client.view.ejector._timer is None)


async def test_a_closed_runtime_leaves_no_timer(cluster: Cluster) -> None:
    caller = cluster.runtime(ejection_s=FOR_EVER_S)
    workers = await Workers(cluster, caller).start(3)
    workers.behaviours[0].error = RuntimeError()
    await workers.calls_until_out(0)
    workers.behaviours[1].gate = asyncio.Event()
    asked = workers.behaviours[1].calls
    held = [workers.client.direct(n, workers.ids[1]) for n in range(30)]
    await until(lambda: workers.behaviours[1].calls == asked + 30)
    ejector = workers.client.view.ejector
    timers = ejector._timer, ejector._return
    await caller.close()
    assert idle(workers.client)()
    assert all(each is not None and each.cancelled() for each in timers)
    for each in held:
        await each.aclose()


def idle(client: Client) -> Callable[[], bool]:
    """Whether nothing is to be looked at, and nobody to come back."""
    ejector = client.view.ejector
    return lambda: ejector._timer is ejector._again is ejector._return is None
