"""The observation seam: what observers see of calls and requests, and that they harm neither."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import pytest

import triton_distributed as trd
from tests.runtime.cluster import Cluster, patiently, until
from triton_distributed.api.operating import add_declared
from triton_distributed.errors import DeadlineExceeded, NoInstances
from triton_distributed.observe.log_context import LogContext
from triton_distributed.observe.observer import CallEnd, CallStart, RequestEnd, RequestStart
from triton_distributed.observe.slow import SlowLog
from triton_distributed.observe.timing import Timing
from triton_distributed.runtime import Context

SET: ContextVar[str] = ContextVar("SET", default="")


class Seen(trd.Observer):
    """Keeps what it sees."""

    def __init__(self) -> None:
        self.starts: list[CallStart] = []
        self.ends: list[CallEnd] = []
        self.came: list[RequestStart] = []
        self.began = 0
        self.over: list[RequestEnd] = []

    def call(self, start: CallStart) -> trd.CallObserver:
        self.starts.append(start)
        return SeenCall(self)

    def request(self, start: RequestStart) -> trd.RequestObserver:
        self.came.append(start)
        return SeenRequest(self)

    @property
    def outcomes(self) -> tuple[list[str], list[str]]:
        """Of the calls and of the requests."""
        return [each.outcome for each in self.ends], [each.outcome for each in self.over]


class SeenCall(trd.CallObserver):
    def __init__(self, seen: Seen) -> None:
        self.seen = seen
        self.travelling = {"observed": "yes"}

    def ended(self, end: CallEnd) -> None:
        self.seen.ends.append(end)


class SeenRequest(trd.RequestObserver):
    def __init__(self, seen: Seen) -> None:
        self.seen = seen

    def began(self) -> None:
        self.seen.began += 1
        SET.set("by the observer")

    def ended(self, end: RequestEnd) -> None:
        self.seen.over.append(end)


class Broken(trd.Observer):
    """Raises wherever it can."""

    def call(self, start: CallStart) -> trd.CallObserver:
        return BrokenCall()

    def request(self, start: RequestStart) -> trd.RequestObserver:
        raise ValueError("broken request")


class BrokenCall(trd.CallObserver):
    travelling = {"\0": object()}  # noqa: RUF012 (it is never changed)

    def ended(self, end: CallEnd) -> None:
        raise ValueError("broken end")


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    made = Cluster()
    yield made
    await made.close()


def observed(cluster: Cluster) -> Seen:
    seen = Seen()
    for runtime in cluster.runtimes:
        runtime.observers.add(seen)
    return seen


async def test_calls_and_requests_are_seen_from_begin_to_end(cluster: Cluster) -> None:
    found: list[Any] = []

    async def handler(request: Any, context: Context) -> Any:
        found.append((SET.get(), dict(context.travelling)))
        return request

    client = await cluster.connect(handler)
    await patiently(client.call("before it is observed"))
    seen = observed(cluster)
    await patiently(client.call(1, context=Context("REQ-1", travelling={"user": "u1"})))
    assert found[1] == ("by the observer", {"user": "u1", "observed": "yes"})
    ((start,), (came,), (end,), (over,)) = (seen.starts, seen.came, seen.ends, seen.over)
    assert (start.endpoint, start.unary, start.hedge, dict(start.travelling)) == ("t.c.e", True, False, {"user": "u1"})
    assert (came.endpoint, came.context.id(), came.context.travelling["user"]) == ("t.c.e", "REQ-1", "u1")
    assert (end.outcome, end.error, end.request_id, end.instance_id) == ("ok", None, "REQ-1", came.instance_id)
    assert (over.outcome, over.error, seen.began) == ("ok", None, 1)
    assert 0 < over.timing.total_s < end.timing.total_s


async def test_every_end_is_seen_once(cluster: Cluster) -> None:
    started = asyncio.Event()

    async def handler(request: Any) -> Any:
        if request == "raise":
            raise KeyError(request)
        if request == "wait":
            started.set()
            await asyncio.Event().wait()
        return request

    client = await cluster.connect(handler)
    seen = observed(cluster)
    with pytest.raises(KeyError):
        await patiently(client.call("raise"))
    assert isinstance(seen.over[0].error, KeyError)
    assert isinstance(seen.ends[0].error, KeyError)
    waiting = asyncio.create_task(client.call("wait"))
    await patiently(started.wait())
    waiting.cancel()
    await asyncio.wait([waiting])
    await until(lambda: len(seen.over) == 2)
    with pytest.raises(DeadlineExceeded):
        await patiently(client.call(1, timeout=0))
    killed = Context()
    killed.kill()
    with pytest.raises(asyncio.CancelledError):
        await client.call(1, context=killed)
    assert seen.ends[-1].request_id == killed.id()
    nowhere = cluster.caller.endpoint("t.c.nowhere")
    with pytest.raises(NoInstances):
        await patiently((await nowhere.client()).call(1))
    await until(lambda: len(seen.over) >= 2)
    assert seen.outcomes[0] == ["error", "cancelled", "deadline", "cancelled", "unreachable"]
    assert seen.outcomes[1][:2] == ["error", "cancelled"]
    assert seen.ends[-1].instance_id is None


async def test_an_observer_that_raises_is_logged_and_does_no_harm(
    cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    async def handler(request: Any, context: Context) -> Any:
        return [request, dict(context.travelling)]

    client = await cluster.connect(handler)
    for runtime in cluster.runtimes:
        runtime.observers.add(Broken())
    seen = observed(cluster)
    with caplog.at_level(logging.WARNING, "triton_distributed"):
        for _ in range(3):
            assert await patiently(client.call(1, context=Context(travelling={"user": "u1"}))) == [1, {"user": "u1"}]
    assert seen.outcomes == (["ok"] * 3, ["ok"] * 3)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 3, said  # Each once, although it happened three times.
    assert any("BrokenCall.ended" in each for each in said)
    assert any("Broken.request" in each for each in said)


class Wrong(trd.Observer):
    """Returns wrong objects, and what travels is wrong too."""

    def __init__(self, found: Any) -> None:
        self.found = found

    def call(self, start: CallStart) -> Any:
        return self.found

    def request(self, start: RequestStart) -> Any:
        return self.found


class WrongCall(trd.CallObserver):
    travelling = None  # type: ignore[assignment]


async def test_wrong_objects_of_an_observer_are_logged_and_change_nothing_else(
    cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    async def handler(request: Any) -> Any:
        return request

    client = await cluster.connect(handler)
    for runtime in cluster.runtimes:
        for wrong in (True, "text", WrongCall()):
            runtime.observers.add(Wrong(wrong))
    seen = observed(cluster)
    with caplog.at_level(logging.WARNING, "triton_distributed"):
        assert await patiently(client.call(1)) == 1
    assert seen.outcomes == (["ok"], ["ok"])
    said = {record.getMessage().split("'s ")[1].split()[0]: record.exc_info for record in caplog.records}
    assert set(said) == {"Wrong.call", "Wrong.request", "WrongCall.travelling"}
    assert "it returned a bool, not a CallObserver or None" in str(said["Wrong.call"])


class Cancels(trd.Observer):
    def request(self, start: RequestStart) -> trd.RequestObserver:
        return CancelsRequest()


class CancelsRequest(trd.RequestObserver):
    def began(self) -> None:
        raise asyncio.CancelledError


async def test_a_request_ends_even_if_its_observer_raises_what_is_no_exception(cluster: Cluster) -> None:
    client = await cluster.connect(_echo)
    for runtime in cluster.runtimes:
        runtime.observers.add(Cancels())
    with pytest.raises(trd.TritonError):
        await patiently(client.call(1))


async def test_what_is_no_observer_is_refused(cluster: Cluster) -> None:
    observers = cluster.caller.observers
    with pytest.raises(TypeError, match="extends triton_distributed.Observer"):
        observers.add(object())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="was not added"):
        observers.remove(trd.Observer())
    one = trd.Observer()
    observers.add(one)
    observers.add(one)
    assert observers.present == [one]
    observers.remove(one)
    assert observers.present == []


async def test_observers_in_the_module_that_serves_are_added() -> None:
    seen = Seen()
    async with trd.connect(trd.Config(discovery="memory", handle_signals=False)) as here:
        add_declared(here, {"SEEN": seen, "again": seen, "Seen": Seen}, [])
        assert here.observers is here.runtime.observers
        await here.serve("t.c.e", _echo)
        await patiently(here.call("t.c.e", 1))
        assert here.observers.present == [seen]
    assert seen.outcomes == (["ok"], ["ok"])


async def _echo(request: Any) -> Any:
    return request


async def test_questions_of_trd_are_not_requests(cluster: Cluster) -> None:
    async def handler(request: Any) -> Any:
        return request

    await cluster.worker(handler)
    seen = observed(cluster)
    (worker,) = [each for each in cluster.runtimes if each.statistics().endpoints]
    (inspect,) = worker.worker.server._reserved
    endpoint = worker.worker.server._find_reserved(inspect)
    assert endpoint is not None
    assert endpoint.observers.present == []
    assert worker.observers.present == [seen]


async def test_slow_calls_and_requests_are_logged_with_their_times(caplog: pytest.LogCaptureFixture) -> None:
    async def handler(request: Any) -> Any:
        return request

    slow = Cluster(slow_s=1e-6)
    try:
        worker = await slow.worker(handler)
        client = await slow.client()
        with caplog.at_level(logging.WARNING, "triton_distributed.slow"):
            context = Context("REQ-1", travelling={"traceparent": f"00-{'a' * 32}-{'b' * 16}-01"})
            await patiently(client.call(1, context=context))
    finally:
        await slow.close()
    for record in caplog.records:
        LogContext().filter(record)
    assert [(each.__dict__["request_id"], each.__dict__["trace_id"]) for each in caplog.records] == [
        ("REQ-1", "a" * 32)
    ] * 2
    where = f"REQ-1, instance {worker.instance_id}, ok"
    (request, call) = [record.getMessage() for record in caplog.records]
    assert request.startswith(f"t.c.e: slow request {where}: ")
    assert "handler" in request
    assert call.startswith(f"t.c.e: slow call {where}: ")
    assert "network" in call


def test_only_what_is_slow_is_logged_and_not_too_often(caplog: pytest.LogCaptureFixture) -> None:
    log = SlowLog(2.0)
    seconds = iter([1.9, 2.0, 5.0, 5.0])
    with caplog.at_level(logging.WARNING, "triton_distributed.slow"):
        for each in seconds:
            observer = log.call(CallStart("a.b.c", True, False, {}))
            assert observer is not None
            observer.ended(CallEnd("deadline", None, "", None, Timing(each, client_queue_s=each)))
    assert [each.getMessage() for each in caplog.records] == [
        "a.b.c: slow call (not sent), deadline: 2000.0 ms (client queue 2000.0)"
    ]


@pytest.mark.parametrize("where", ["memory", "unix"])
async def test_the_end_of_a_call_is_not_seen_in_the_context_of_a_request(where: str, trd_dir: Path) -> None:
    """A session's callbacks must not run as the request that dialled it: log lines would name that one."""
    found: list[Any] = []

    class Names(trd.Observer):
        def call(self, start: CallStart) -> trd.CallObserver:
            return NamesEnd()

    class NamesEnd(trd.CallObserver):
        def ended(self, end: CallEnd) -> None:
            found.append(trd.current_context())

    async def inner(request: Any) -> Any:
        return request

    async def outer(request: Any) -> Any:
        return await (await middle.endpoint("t.c.inner").client()).call(request)

    cluster = Cluster(**({} if where == "memory" else {"discovery": "file", "directory": trd_dir}))
    try:
        await cluster.worker(inner, "t.c.inner")
        middle = await cluster.worker(outer)
        await patiently((await cluster.client()).call(1, context=Context("the one that dials")))
        middle.observers.add(Names())
        await patiently((await middle.endpoint("t.c.inner").client()).call(1))
        assert found == [None]
    finally:
        await cluster.close()
