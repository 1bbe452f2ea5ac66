"""Spans of OpenTelemetry: one trace for one request, whichever workers it passes and however its calls end."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from tests.runtime.cluster import Cluster, drained, patiently, until
from tests.runtime.fakes import DropsTheFirst, FakeWorker
from tests.timing import MS
from triton_distributed import Traces
from triton_distributed.errors import DeadlineExceeded, Overloaded
from triton_distributed.observe.log_context import LogContext
from triton_distributed.observe.log_format import log_formatter
from triton_distributed.runtime import Context

logger = logging.getLogger("tests.traces")
PARENT = f"00-{'a' * 32}-{'b' * 16}-01"


class Spans:
    """The finished spans of one test."""

    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()
        self.provider = TracerProvider()
        self.provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.tracer = self.provider.get_tracer("the program's own")

    def all(self) -> tuple[ReadableSpan, ...]:
        return self.exporter.get_finished_spans()

    def of(self, name: str, kind: SpanKind) -> list[ReadableSpan]:
        return [each for each in self.all() if each.name == name and each.kind == kind]

    async def pair(self, name: str = "t.c.e") -> tuple[ReadableSpan, ReadableSpan]:
        """The span of the only call of an endpoint, and that of its request."""
        await until(lambda: self.of(name, SpanKind.CLIENT) and self.of(name, SpanKind.SERVER))
        ((client,), (server,)) = self.of(name, SpanKind.CLIENT), self.of(name, SpanKind.SERVER)
        return client, server


def ids(span: ReadableSpan) -> tuple[int, int]:
    context = span.get_span_context()
    assert context is not None
    return context.trace_id, context.span_id


def parent_of(span: ReadableSpan) -> tuple[int, int] | None:
    return None if span.parent is None else (span.parent.trace_id, span.parent.span_id)


def attributes(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


def status(span: ReadableSpan) -> tuple[StatusCode, Any, Any]:
    found = attributes(span)
    return span.status.status_code, found["rpc.response.status_code"], found.get("error.type")


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Spans:
    """The program has configured the SDK. (A provider of the process can be set only once.)"""
    made = Spans()
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: made.provider)
    return made


@pytest.fixture
async def cluster(trd_dir: Path) -> AsyncIterator[Cluster]:
    """Runtimes that meet on Unix sockets."""
    made = Cluster(discovery="file", directory=trd_dir)
    yield made
    await made.close()


@pytest.fixture
async def joined() -> AsyncIterator[Cluster]:
    """Runtimes joined in memory."""
    made = Cluster()
    yield made
    await made.close()


@pytest.fixture
def lines() -> Iterator[list[dict[str, Any]]]:
    found: list[dict[str, Any]] = []

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(json.loads(self.format(record)))

    handler = Lines()
    handler.addFilter(LogContext())
    handler.setFormatter(log_formatter("json"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield found
    logger.removeHandler(handler)


async def test_a_request_through_three_workers_is_one_trace_and_one_id_in_the_logs(
    cluster: Cluster, spans: Spans, lines: list[dict[str, Any]]
) -> None:
    def last(request: Any) -> Any:  # in a thread
        logger.info("last")
        return request

    async def middle(request: Any) -> AsyncIterator[Any]:
        logger.info("middle")
        for _ in range(2):
            yield await (await cluster.client("t.c.last")).call(request)

    async def first(request: Any) -> Any:
        logger.info("first")
        with spans.tracer.start_as_current_span("of the handler"):
            logger.info("inside")
            return await drained((await cluster.client("t.c.middle")).generate(request, annotated=False))

    workers = [await cluster.worker(handler, f"t.c.{handler.__name__}") for handler in (last, middle, first)]
    with spans.tracer.start_as_current_span("of the program"):
        assert await patiently((await cluster.client("t.c.first")).call(7, context=Context("REQ-1"))) == [7, 7]
    await until(lambda: len(spans.all()) == 2 + 4 * 3)

    (root,), (own,) = spans.of("of the program", SpanKind.INTERNAL), spans.of("of the handler", SpanKind.INTERNAL)
    first_call, first_request = await spans.pair("t.c.first")
    middle_call, middle_request = await spans.pair("t.c.middle")
    chain = [root, first_call, first_request, own, middle_call, middle_request]
    assert [parent_of(each) for each in chain] == [None, *map(ids, chain[:-1])]
    last_calls, last_requests = spans.of("t.c.last", SpanKind.CLIENT), spans.of("t.c.last", SpanKind.SERVER)
    assert [parent_of(each) for each in last_calls] == [ids(middle_request)] * 2
    assert [parent_of(each) for each in last_requests] == [*map(ids, last_calls)]
    waits = spans.of("queue", SpanKind.INTERNAL)
    assert {*map(parent_of, waits)} == {*map(ids, [first_request, middle_request, *last_requests])}
    assert len(waits) == 4
    assert {ids(each)[0] for each in spans.all()} == {ids(root)[0]}

    expected = {"rpc.system.name": "triton_distributed", "rpc.response.status_code": "ok", "triton.request_id": "REQ-1"}
    for worker, name in zip(workers, ("t.c.last", "t.c.middle", "t.c.first"), strict=True):
        both = {**expected, "rpc.method": name, "triton.instance_id": str(worker.instance_id)}
        for each in (*spans.of(name, SpanKind.CLIENT), *spans.of(name, SpanKind.SERVER)):
            assert attributes(each).items() >= both.items()
            assert each.status.status_code == StatusCode.UNSET
    assert attributes(middle_call)["triton.first_item_s"] > 0

    assert [each["message"] for each in lines] == ["first", "inside", "middle", "last", "last"]
    assert {each["request_id"] for each in lines} == {"REQ-1"}
    where = [first_request, own, middle_request, *last_requests]
    assert [(each["trace_id"], each["span_id"]) for each in lines] == [
        (f"{trace_id:032x}", f"{span_id:016x}") for trace_id, span_id in map(ids, where)
    ]


async def test_an_error_is_recorded_where_it_arose_and_where_it_passes(joined: Cluster, spans: Spans) -> None:
    async def inner(request: Any) -> Any:
        raise KeyError("missing")

    async def outer(request: Any) -> Any:
        return await (await joined.client("t.c.inner")).call(request)

    await joined.worker(inner, "t.c.inner")
    client = await joined.connect(outer)
    with pytest.raises(KeyError):
        await patiently(client.call(1))
    found = [*await spans.pair("t.c.inner"), *await spans.pair()]
    assert [status(each) for each in found] == [(StatusCode.ERROR, "error", "KeyError")] * 4
    events = [[(each.name, dict(each.attributes or {})) for each in span.events] for span in found]
    assert [[name for name, _ in each] for each in events] == [["exception"]] * 4
    ((_, arisen),) = events[1]
    assert (arisen["exception.type"], arisen["exception.message"]) == ("KeyError", "'missing'")
    assert 'raise KeyError("missing")' in str(arisen["exception.stacktrace"])
    assert "triton_distributed/" not in str(arisen["exception.stacktrace"])


async def test_who_leaves_a_stream_has_made_no_error(joined: Cluster, spans: Spans) -> None:
    async def forever(request: Any) -> AsyncIterator[int]:
        while True:
            yield 1
            await asyncio.sleep(0)

    client = await joined.connect(forever)
    async for _ in client.generate(1):
        break
    assert [status(each) for each in await spans.pair()] == [(StatusCode.UNSET, "cancelled", None)] * 2


async def test_a_missed_deadline_is_an_error_of_both(joined: Cluster, spans: Spans) -> None:
    async def forever(request: Any) -> None:
        await asyncio.Event().wait()

    client = await joined.connect(forever)
    for timeout in (20 * MS, 200 * MS, 2000 * MS):  # until the handler has begun
        with pytest.raises(DeadlineExceeded):
            await patiently(client.call(1, timeout=timeout))
        if spans.of("queue", SpanKind.INTERNAL):
            break
    call = spans.of("t.c.e", SpanKind.CLIENT)[-1]
    assert status(call) == (StatusCode.ERROR, "deadline", "DeadlineExceeded")
    await until(lambda: spans.of("t.c.e", SpanKind.SERVER))
    assert status(spans.of("t.c.e", SpanKind.SERVER)[-1]) == (StatusCode.ERROR, "deadline", "deadline")


async def test_a_request_that_waits_has_a_long_queue_and_one_too_many_is_refused(joined: Cluster, spans: Spans) -> None:
    go = asyncio.Event()

    async def handler(request: Any) -> Any:
        if request == "first":
            await go.wait()
        return request

    worker = await joined.worker(handler, max_inflight=1, max_queue=1)
    client = await joined.client()
    calls = [asyncio.create_task(client.call("first")), asyncio.create_task(client.call("second"))]
    await until(lambda: worker.statistics().endpoints[0].waiting == 1)
    with pytest.raises(Overloaded):
        await patiently(client.call("third"))
    go.set()
    assert await patiently(asyncio.gather(*calls)) == ["first", "second"]
    await until(lambda: len(spans.all()) == 3 + 3 + 2)
    refused, first, second = spans.of("t.c.e", SpanKind.SERVER)  # In the order of their ends.
    assert status(refused) == (StatusCode.UNSET, "refused", None)
    _, wait = spans.of("queue", SpanKind.INTERNAL)
    assert parent_of(wait) == ids(second)
    times = wait.start_time, first.end_time, wait.end_time
    assert sorted(each or 0 for each in times) == [*times]
    assert status(spans.of("t.c.e", SpanKind.CLIENT)[0]) == (StatusCode.ERROR, "refused", "Overloaded")


async def test_failed_attempts_are_events_of_the_call(joined: Cluster, spans: Spans) -> None:
    fake = await FakeWorker(DropsTheFirst()).start(5)
    client = await joined.client()
    assert await patiently(client.call("once more")) == 1
    (call,) = spans.of("t.c.e", SpanKind.CLIENT)
    assert call.status.status_code == StatusCode.UNSET
    ((name, event),) = [(each.name, dict(each.attributes or {})) for each in call.events]
    assert (name, event["triton.instance_id"], event["triton.again"]) == ("attempt failed", "5", True)
    assert "memory://fake-5" in str(event["triton.reason"])
    await fake.close()


async def test_a_hedge_is_a_call_beside_the_first(joined: Cluster, spans: Spans) -> None:
    async def stuck(request: Any) -> Any:
        await asyncio.Event().wait()

    async def answers(request: Any) -> Any:
        return request

    slow = await joined.worker(stuck)
    await joined.worker(answers)
    client = await joined.client(
        policy=lambda request, all, load: next((e for e in all if e.id == slow.instance_id), all[0])
    )
    await until(lambda: len(client.instance_ids()) == 2)
    with spans.tracer.start_as_current_span("root") as root:
        assert await patiently(client.call(1, idempotent=True, hedge_after_s=10 * MS)) == 1
    await until(lambda: len(spans.of("t.c.e", SpanKind.CLIENT)) == 2)
    second, first = spans.of("t.c.e", SpanKind.CLIENT)
    assert [attributes(each).get("triton.hedge", False) for each in (first, second)] == [False, True]
    assert [status(each)[1] for each in (first, second)] == ["cancelled", "ok"]
    assert [parent_of(each) for each in (first, second)] == [ids(root)] * 2  # type: ignore[arg-type]


async def test_a_trace_passes_a_worker_that_makes_no_spans(joined: Cluster, spans: Spans) -> None:
    seen: list[Any] = []

    async def last(request: Any, context: Context) -> None:
        seen.append(dict(context.travelling))

    async def middle(request: Any, context: Context) -> None:
        seen.append(dict(context.travelling))
        client = await joined.runtimes[-1].endpoint("t.c.last").client()
        await client.call(request)

    await joined.worker(last, "t.c.last")
    client = await joined.client("t.c.last")
    silent = joined.runtime(traces=False)
    await joined.serve(silent, middle)
    sent = {"traceparent": PARENT, "tracestate": "vendor=1", "baggage": "tenant=a", "user": "u1"}
    client = await joined.client()
    await patiently(client.call(1, context=Context("r", travelling=sent)))
    await until(lambda: spans.of("t.c.last", SpanKind.SERVER))
    (call,), (request,) = spans.of("t.c.e", SpanKind.CLIENT), spans.of("t.c.last", SpanKind.SERVER)
    assert parent_of(call) == (int("a" * 32, 16), int("b" * 16, 16))
    assert parent_of(request) == ids(call)
    assert not spans.of("t.c.e", SpanKind.SERVER)
    expected = {**sent, "traceparent": f"00-{'a' * 32}-{ids(call)[1]:016x}-01"}
    assert seen == [expected, expected]


async def test_what_is_not_sampled_makes_no_spans_at_any_worker(joined: Cluster, spans: Spans) -> None:
    seen: list[Any] = []

    async def handler(request: Any, context: Context) -> None:
        seen.append(context.travelling["traceparent"])

    client = await joined.connect(handler)
    await patiently(client.call(1, context=Context(travelling={"traceparent": f"{PARENT[:-2]}00"})))
    assert seen[0].startswith(f"00-{'a' * 32}-")
    assert seen[0].endswith("-00")
    assert spans.all() == ()


async def test_a_handlers_trace_is_not_that_of_the_code_that_serves_it(joined: Cluster, spans: Spans) -> None:
    async def handler(request: Any) -> Any:
        return request

    with spans.tracer.start_as_current_span("start-up"):
        await joined.worker(handler)
    client = await joined.client()
    await patiently(client.call(1))
    call, request = await spans.pair()
    assert (parent_of(call), parent_of(request)) == (None, ids(call))


async def test_the_sdk_may_be_configured_later_and_a_program_may_add_the_spans_itself(joined: Cluster) -> None:
    async def handler(request: Any) -> Any:
        return request

    spans = Spans()
    await joined.worker(handler)
    client = await joined.client()
    await patiently(client.call(1))
    assert joined.caller.observers.present == []
    joined.caller.observers.add(Traces(spans.provider))
    await patiently(client.call(1))
    assert [each.kind for each in spans.all()] == [SpanKind.CLIENT]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trace, "get_tracer_provider", lambda: spans.provider)
        await joined.worker(handler, "t.c.later")
        await joined.client()
    assert [len(each.observers.present) for each in joined.runtimes] == [0, 1, 1]


async def test_a_configuration_that_cannot_be_used_is_logged_and_calls_go_on(
    joined: Cluster, spans: Spans, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise ValueError("Propagator nowhere not found")

    async def handler(request: Any) -> Any:
        return request

    monkeypatch.setattr(trace, "get_tracer", broken)
    client = await joined.connect(handler)
    assert await patiently(client.call(1)) == 1
    said = [each.getMessage() for each in caplog.records if each.levelno == logging.WARNING]
    assert said == ["there are no spans: OpenTelemetry cannot be used: Propagator nowhere not found"] * 2


async def test_without_opentelemetry_everything_else_works(joined: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [each for each in sys.modules if each.split(".")[0] == "opentelemetry"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "opentelemetry", None)  # It cannot be imported.
    with pytest.raises(ImportError, match=r"pip install triton-distributed\[otel\]"):
        Traces()

    async def handler(request: Any, context: Context) -> Any:
        record = logging.LogRecord("x", 0, "", 0, "", None, None)
        LogContext().filter(record)
        return context.travelling["traceparent"], record.__dict__["trace_id"]

    client = await joined.connect(handler)
    context = Context(travelling={"traceparent": PARENT})
    assert await patiently(client.call(1, context=context)) == [PARENT, "a" * 32]
