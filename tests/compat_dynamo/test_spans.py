"""Spans of Dynamo's programs are those of OpenTelemetry, if the program has configured it."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from tests.runtime.cluster import Cluster, patiently
from triton_distributed.compat.dynamo import Context

PARENT = f"00-{'a' * 32}-{'b' * 16}-01"


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    made = Cluster()
    yield made
    await made.close()


async def test_spans_of_a_handler(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: provider)
    ids: list[Any] = []

    async def handler(request: Any, native: Any) -> Any:
        context = Context("one", {"traceparent": native.travelling["traceparent"]})
        ids.append((context.trace_id, context.span_id, context.parent_span_id))
        context.current_span().set_attribute("mine", 1)
        with context.start_span("stage", {"a": 1}) as span, pytest.raises(KeyError):
            span.add_event("reached", {"b": 2})
            with context.start_span("below") as below:
                below.set_status("error", "not there")
                raise KeyError("x")
        left = context.start_span("left open")
        left.set_status("OK", "ignored")
        left.close()
        left.close()
        return request

    client = await cluster.connect(handler)
    assert await patiently(client.call(1)) == 1
    spans = {each.name: each for each in exporter.get_finished_spans()}
    below, stage, left = (spans[name] for name in ("below", "stage", "left open"))
    (call,) = [each for each in exporter.get_finished_spans() if each.kind == SpanKind.CLIENT]
    server = stage.parent
    assert server is not None
    assert below.parent == stage.get_span_context()
    assert left.parent == server
    assert ids[0][:2] == (f"{server.trace_id:032x}", f"{server.span_id:016x}")
    sent = call.get_span_context()
    assert sent is not None
    assert ids[0][2] == f"{sent.span_id:016x}"
    assert [each.name for each in stage.events] == ["reached"]
    assert below.status.status_code == StatusCode.ERROR
    assert [each.name for each in below.events] == ["exception"]
    assert (left.status.status_code, left.status.description) == (StatusCode.OK, None)


def test_without_opentelemetry_they_record_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "opentelemetry.trace")
    context = Context("one", {"traceparent": PARENT})
    assert (context.trace_id, context.span_id, context.parent_span_id) == ("a" * 32, "b" * 16, None)
    with context.start_span("stage", {"a": 1}) as span:
        span.set_attribute("k", 1)
        span.add_event("e")
        span.set_status("error", "x")
    context.current_span().close()
