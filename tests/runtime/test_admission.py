"""The queue in front of an endpoint: order, deadlines, and what the refused are told."""

from __future__ import annotations

import asyncio
import heapq
import random
from types import SimpleNamespace
from typing import Any

import pytest

from tests.runtime.cluster import Cluster, into, longer, patiently, until
from tests.timing import PATIENCE_S
from triton_distributed.context import Context
from triton_distributed.errors import DeadlineExceeded, Overloaded
from triton_distributed.serving.admission import Admission


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
    await until(lambda: cluster.served()[0].waiting == count)


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
    assert list(await patiently(asyncio.gather(low, high))) == ["low", "high"]
    assert gate.began == ["first", "high", "low"]


async def test_the_log_says_that_an_endpoint_refuses_and_does_not_repeat_it(
    cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    gate, client = await full(cluster)
    for name in ("A", "B", "C"):
        with pytest.raises(Overloaded):
            await patiently(client.call(name, context=Context(name)))
    gate.open.release()
    [record] = [each for each in caplog.records if "refused" in each.getMessage()]
    said = record.getMessage()
    assert "request A: refused, at capacity: 1 requests run" in said
    assert "the limits are max_inflight=1, max_queue=0" in said
    assert record.__dict__["request_id"] == "A"


async def test_a_call_in_a_handler_has_its_requests_priority(cluster: Cluster) -> None:
    async def inner(request: Any, context: Any) -> int:
        priority: int = context.priority
        return priority

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
    (served,) = [each for runtime in cluster.runtimes for each in runtime.worker.server.endpoints]
    served.gate.queue.mean_s = 3600.0  # as if handlers had taken an hour each
    with pytest.raises(Overloaded, match=r"deadline is in .* try again in 3\.6e\+03 s") as caught:
        await patiently(client.call("no", timeout=PATIENCE_S))
    assert caught.value.retry_after_s == 3600.0
    patient = asyncio.ensure_future(client.call("patient"))  # who gives no deadline may wait
    await waiting(cluster, 1)
    gate.open.release()
    gate.open.release()
    assert await patiently(patient) == "patient"
    assert gate.began == ["first", "patient"]
    assert served.gate.queue.mean_s < 3600.0  # it learns


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
    admission: Admission[Any] = Admission(max_inflight=4, max_queue=10)
    assert admission.wait_s(0) == 0.0
    admission.took(2.0)
    assert admission.mean_s == 2.0
    admission.took(1.0)
    assert admission.mean_s == pytest.approx(1.9)
    for number in range(3):
        assert admission.wait_s(0) == pytest.approx((number + 1) * 1.9 / 4)
        assert admission.enter(object(), 0) is None
    assert admission.wait_s(1) == pytest.approx(1.9 / 4)
    assert len(admission.clear()) == 3
    assert admission.next() is None


async def served(cluster: Cluster) -> Any:
    (found,) = [each for runtime in cluster.runtimes for each in runtime.worker.server.endpoints]
    return found


async def test_who_would_be_late_when_its_turn_comes_gives_it_to_others(cluster: Cluster) -> None:
    gate, client = await full(cluster, max_queue=10)
    late = asyncio.ensure_future(client.call("late", timeout=PATIENCE_S))
    await waiting(cluster, 1)
    patient = asyncio.ensure_future(client.call("patient"))
    await waiting(cluster, 2)
    (await served(cluster)).gate.queue.mean_s = 3600.0  # as if handlers had begun to take an hour meanwhile
    gate.open.release()
    with pytest.raises(Overloaded, match=r"it has waited until .* s are left"):
        await patiently(late)
    gate.open.release()
    assert await patiently(patient) == "patient"
    assert gate.began == ["first", "patient"]


async def test_who_would_be_late_is_tried_where_nobody_else_waits(cluster: Cluster) -> None:
    gate, client = await full(cluster, max_queue=10)
    late = asyncio.ensure_future(client.call("late", timeout=PATIENCE_S))
    await waiting(cluster, 1)
    (await served(cluster)).gate.queue.mean_s = 3600.0
    gate.open.release()
    gate.open.release()
    assert await patiently(late) == "late"


async def test_handlers_that_outlive_every_deadline_are_learned_from(cluster: Cluster) -> None:
    async def never(request: Any) -> None:
        await asyncio.Event().wait()

    client = await cluster.connect(never, max_inflight=1, max_queue=10)
    admission = (await served(cluster)).gate.queue
    assert admission.mean_s == 0.0
    async with asyncio.timeout(PATIENCE_S):
        while not admission.mean_s:  # a first request may come too late to be begun: it is still being connected
            with pytest.raises((DeadlineExceeded, Overloaded)):  # the latter once it was learned
                await client.call(1, timeout=0.05)


async def test_every_estimate_is_compared_with_what_came_of_it(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[tuple[int, bool]] = []
    monkeypatch.setattr(Admission, "ended", lambda self, priority, late_s, whole=True: ended.append((priority, whole)))
    gate, client = await full(cluster, max_queue=10)
    (await served(cluster)).gate.queue.mean_s = 1e-6
    waited = asyncio.ensure_future(client.call("waited", priority=3))
    await waiting(cluster, 1)
    for limit_s in longer(0.02):
        with pytest.raises(DeadlineExceeded):
            await patiently(client.call("late", timeout=limit_s))
        await waiting(cluster, 1)
        if ended:  # it was in the queue, and not on its way there
            break
    assert ended == [(0, False)]
    for _ in range(3):
        gate.open.release()
    await patiently(waited)
    await patiently(client.call("at once", priority=5))
    await until(lambda: len(ended) == 3)
    assert ended[1:] == [(3, True), (5, True)]  # of "first" nobody could expect anything


def test_estimates_that_were_wrong_widen_the_margin_up_to_a_quarter() -> None:
    admission: Admission[Any] = Admission(max_inflight=1, max_queue=10)
    admission.took(1.0)
    assert admission.in_time(0, 2.0)  # one second until its turn, one for itself
    admission.ended(0, -1.0, whole=False)  # its caller left early: that tells nothing
    assert admission.in_time(0, 2.0)
    for _ in range(50):
        admission.ended(0, 0.5, whole=False)
    assert not admission.in_time(0, 2.3)
    assert admission.in_time(0, 2.7)
    assert admission.in_time(1, 2.0)  # those of higher priority are not overtaken
    for _ in range(50):
        admission.ended(0, 100.0)
    assert not admission.in_time(0, 2.6)
    assert admission.in_time(0, 2.7)
    for _ in range(1000):
        admission.ended(0, 0.0)
    assert admission.in_time(0, 2.1)


def test_a_handler_that_was_cut_short_says_only_that_they_take_no_less() -> None:
    admission: Admission[Any] = Admission(max_inflight=1, max_queue=10)
    admission.took(1.0)
    admission.took(0.5, whole=False)
    assert admission.mean_s == 1.0
    admission.took(2.0, whole=False)
    assert admission.mean_s == pytest.approx(1.1)


class Flooded:
    """An endpoint's queue in virtual time, with twice the requests that it has room for."""

    def __init__(self, spread: float) -> None:
        self.admission: Admission[Any] = Admission(max_inflight=8, max_queue=64)
        self.rng = random.Random(1)
        self.spread = spread
        self.running = 0
        self.good = self.late = self.refused = 0
        self.now = 0.0
        self.events: list[
            tuple[float, int, Any]
        ] = []  # when, in which order, and the request that ends; None: one comes

    def at(self, when: float, request: Any = None) -> None:
        heapq.heappush(self.events, (when, len(self.events) + self.rng.getrandbits(32), request))

    def come(self) -> None:
        request = SimpleNamespace(came=self.now, started=0.0, due=0.0)
        if self.running < 8:
            self.start(request)
        elif self.admission.in_time(0, 0.1):
            request.due = self.now + self.admission.wait_s(0) + self.admission.mean_s
            self.refused += self.admission.enter(request, 0) is not None
        else:
            self.refused += 1

    def start(self, request: Any) -> None:
        self.running += 1
        request.started = self.now
        self.at(self.now + 0.02 * self.rng.gauss(1.0, self.spread), request)

    def end(self, request: Any) -> None:
        self.running -= 1
        self.late += self.now > request.came + 0.1
        self.good += self.now <= request.came + 0.1
        self.admission.took(self.now - request.started)
        if request.due:
            self.admission.ended(0, self.now - request.due)
        if (waiting := self.admission.next()) is not None:
            self.start(waiting)

    def run(self, seconds: float) -> None:
        for number in range(int(seconds * 800)):  # 8 places, 20 ms each: 400 a second
            self.at(number / 800)
        while self.events:
            self.now, _, request = heapq.heappop(self.events)
            if request is None:
                self.come()
            else:
                self.end(request)


@pytest.mark.parametrize("spread", [0.01, 0.1, 0.25])
def test_at_twice_the_capacity_nearly_all_that_is_let_in_is_answered_in_time(spread: float) -> None:
    flooded = Flooded(spread)
    flooded.run(30.0)
    assert flooded.good >= 0.9 * 30.0 * 400
    assert flooded.late <= 0.01 * (flooded.good + flooded.late)
    assert flooded.good + flooded.late + flooded.refused == 24_000
