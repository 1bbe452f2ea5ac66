"""What Dynamo's programs rely on, within one process."""

from __future__ import annotations

import asyncio
import gc
import importlib
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

import triton_distributed
from tests.runtime.cluster import patiently, until
from tests.timing import PATIENCE_S
from triton_distributed.compat import dynamo
from triton_distributed.compat.dynamo import Annotated, Client, Context, DistributedRuntime, RouterMode
from triton_distributed.compat.dynamo.handlers import MOST_BYTES
from triton_distributed.compat.dynamo.llm.exceptions import CannotConnect, Disconnected, WorkerUnavailable


async def connect(runtime: DistributedRuntime, handler: Callable[..., Any], name: str = "t.c.e") -> Client:
    """A client of an endpoint that `runtime` serves from now on."""
    asyncio.ensure_future(runtime.endpoint(name).serve_endpoint(handler))  # noqa: RUF006
    client = await runtime.endpoint(name).client()
    await patiently(client.wait_for_instances())
    return client


async def items_of(stream: Any) -> list[Any]:
    return [item async for item in await stream]


class Counting:
    """Handlers that count until they notice the stop."""

    def __init__(self) -> None:
        self.seen: list[Any] = []
        self.go_on = asyncio.Event()
        self.ended = asyncio.Event()

    async def looks(self, request: Any, context: Context) -> AsyncIterator[int]:
        try:
            number = 0
            while not context.is_stopped():
                yield number
                number += 1
                await asyncio.sleep(0)
            self.seen.append((context.is_stopped(), context.is_killed()))
            raise asyncio.CancelledError
        finally:
            self.ended.set()

    async def never_looks(self, request: Any) -> AsyncIterator[int]:
        try:
            yield 0
            await self.go_on.wait()
            self.seen.append("was not interrupted")
            for number in range(1, 1_000_000):
                yield number
                await asyncio.sleep(0)
        except GeneratorExit:
            self.seen.append("closed")
            raise
        finally:
            self.ended.set()


# --- stopping --------------------------------------------------------------------------------------------------------


async def test_a_stop_ends_the_stream_at_once_and_the_handler_is_told(runtime: DistributedRuntime) -> None:
    handlers = Counting()
    client = await connect(runtime, handlers.looks)
    context = Context()
    got = []
    async for item in await client.generate(1, context=context):
        got.append(item.data())
        if len(got) == 3:
            context.stop_generating()
    assert got == [0, 1, 2]
    await patiently(handlers.ended.wait())
    assert handlers.seen == [(True, False)]


async def test_a_stop_ends_a_read_that_waits(runtime: DistributedRuntime) -> None:
    handlers = Counting()
    client = await connect(runtime, handlers.never_looks)
    context = Context()
    stream = await client.generate(1, annotated=False, context=context)
    assert await patiently(anext(stream)) == 0
    reading = asyncio.ensure_future(anext(stream, "end"))
    await asyncio.sleep(0)
    context.stop_generating()
    assert await patiently(reading) == "end"
    handlers.go_on.set()
    await patiently(handlers.ended.wait())  # It never looks: it is closed at a yield, as in Dynamo.
    assert handlers.seen == ["was not interrupted", "closed"]


@pytest.mark.parametrize("when", ["before the call", "before it is awaited"])
async def test_a_call_that_is_stopped_early_yields_nothing(when: str, runtime: DistributedRuntime) -> None:
    handlers = Counting()
    client = await connect(runtime, handlers.looks)
    context = Context()
    if when == "before the call":
        context.stop_generating()
    request = client.generate(1, context=context)
    context.stop_generating()
    assert await patiently(items_of(request)) == []
    await patiently(handlers.ended.wait())
    assert handlers.seen == [(True, False)]


async def test_stop_may_be_called_in_another_thread(runtime: DistributedRuntime) -> None:
    handlers = Counting()
    client = await connect(runtime, handlers.looks)
    context = Context()
    stream = await client.generate(1, context=context)
    assert (await patiently(anext(stream))).data() == 0
    thread = threading.Thread(target=context.stop_generating)
    thread.start()
    thread.join(PATIENCE_S)
    assert context.is_stopped()
    async with asyncio.timeout(PATIENCE_S):
        async for _ in stream:
            pass
    await patiently(handlers.ended.wait())


async def test_a_loop_that_is_left_may_be_continued_and_a_dropped_stream_is_cancelled(
    runtime: DistributedRuntime,
) -> None:
    handlers = Counting()
    client = await connect(runtime, handlers.looks)
    stream = await client.generate(1, annotated=False)
    async for first in stream:
        assert first == 0
        break
    async for second in stream:
        assert second == 1
        break
    assert not handlers.ended.is_set()
    del stream
    await patiently(handlers.ended.wait())


async def test_a_context_forgets_the_streams_of_its_calls(runtime: DistributedRuntime) -> None:
    handlers = Counting()
    client = await connect(runtime, handlers.looks)
    context = Context()
    stream = await client.generate(1, context=context)
    await patiently(anext(stream))
    del stream
    await patiently(handlers.ended.wait())
    assert not context.native._calls


async def test_a_stream_leaves_nothing_for_the_collector(runtime: DistributedRuntime) -> None:
    async def handler(request: Any, context: Context) -> AsyncIterator[int]:
        yield 1

    client = await connect(runtime, handler)
    context = Context()
    await patiently(items_of(client.generate(1, context=context)))
    gc.collect()
    gc.disable()
    try:
        await patiently(items_of(client.generate(1, context=context)))
        assert not [each for each in gc.get_objects() if isinstance(each, dynamo.AsyncResponseStream)]
    finally:
        gc.enable()


async def test_killed_or_stopped_is_a_future_of_true(runtime: DistributedRuntime) -> None:
    told: list[Any] = []

    async def handler(request: Any, context: Context) -> AsyncIterator[int]:
        stopped = context.async_killed_or_stopped()
        assert asyncio.isfuture(stopped)
        yield 1
        told.append(await stopped)
        told.append(await context.async_killed_or_stopped())

    client = await connect(runtime, handler)
    context = Context()
    async for _ in await client.generate(1, context=context):
        context.stop_generating()
    await until(lambda: told == [True, True])


async def test_a_handler_that_stops_its_own_request_looks_broken_to_the_caller(runtime: DistributedRuntime) -> None:
    async def handler(request: Any, context: Context) -> AsyncIterator[int]:
        yield 1
        context.stop_generating()

    client = await connect(runtime, handler)
    got = []
    with pytest.raises(ValueError, match="Stream ended before generation completed"):
        async for item in await client.generate(1):
            got.append(item.data())
    assert got == [1]


async def test_a_cancellation_that_the_caller_did_not_ask_for_is_an_error(runtime: DistributedRuntime) -> None:
    async def handler(request: Any, context: Context) -> AsyncIterator[int]:
        yield 1
        raise asyncio.CancelledError

    client = await connect(runtime, handler)
    with pytest.raises(ValueError, match="CancelledError"):
        await patiently(items_of(client.generate(1)))


async def test_a_nested_call_is_linked_only_by_its_context(runtime: DistributedRuntime) -> None:
    inner = {"linked": Counting(), "independent": Counting()}
    clients = {name: await connect(runtime, each.looks, f"t.c.{name}") for name, each in inner.items()}
    streams: list[Any] = []

    async def outer(request: Any, context: Context) -> AsyncIterator[str]:
        streams.append(await clients["independent"].generate(1))
        linked = await clients["linked"].generate(1, context=context)
        async for _ in streams[0]:
            break
        async for _ in linked:
            yield "item"

    client = await connect(runtime, outer)
    context = Context()
    async for _ in await client.generate(1, context=context):
        context.stop_generating()
    await patiently(inner["linked"].ended.wait())
    assert not inner["independent"].ended.is_set()
    assert (await patiently(anext(streams[0]))).data() == 1
    streams.clear()
    await patiently(inner["independent"].ended.wait())


# --- contexts --------------------------------------------------------------------------------------------------------


async def test_metadata_is_live_and_travels(runtime: DistributedRuntime) -> None:
    async def inner(request: Any, context: Context) -> AsyncIterator[Any]:
        yield [context.id(), context.metadata.copy(), context.trace_headers(), context.trace_id]

    inner_client = await connect(runtime, inner, "t.c.inner")

    async def outer(request: Any, context: Context) -> AsyncIterator[Any]:
        context.metadata["stage"] = "outer"
        del context.metadata["drop"]
        async for item in await inner_client.generate(1, annotated=False, context=context):
            yield item
        async for item in await inner_client.generate(1, annotated=False, context=context.detached("child")):
            yield item

    client = await connect(runtime, outer)
    parent = "00-" + "a" * 32 + "-" + "b" * 16 + "-01"
    context = Context("mine", {"tenant": "a", "drop": "me", "traceparent": parent})
    first, second = await patiently(items_of(client.generate(1, annotated=False, context=context)))
    sent = {"tenant": "a", "stage": "outer", "traceparent": parent}
    assert first == ["mine", sent, {"traceparent": parent}, "a" * 32]
    assert second[:2] == ["child", sent]
    assert context.metadata.copy() == {"tenant": "a", "drop": "me", "traceparent": parent}


async def test_trace_headers_travel_by_themselves(runtime: DistributedRuntime) -> None:
    async def inner(request: Any, context: Context) -> AsyncIterator[Any]:
        yield [context.id() == request, context.trace_id, context.metadata.copy()]

    inner_client = await connect(runtime, inner, "t.c.inner")

    async def outer(request: Any, context: Context) -> AsyncIterator[Any]:
        async for item in inner_client_call(context.id()):
            yield item

    async def inner_client_call(id: str) -> AsyncIterator[Any]:
        async for item in await inner_client.generate(id, annotated=False):
            yield item

    await connect(runtime, outer)
    native = await runtime.native.endpoint("t.c.e").client()
    context = triton_distributed.Context(travelling={"traceparent": "00-" + "a" * 32 + "-" + "b" * 16 + "-01"})
    assert await patiently(native.call(1, context=context)) == [False, "a" * 32, {}]


def test_metadata_is_a_mapping_of_text() -> None:
    context = Context("a", {"k": "v"})
    assert (context.metadata["k"], context.metadata.get("x"), context.metadata.pop("x", "y")) == ("v", None, "y")
    assert repr(context.metadata) == '{"k": "v"}'
    with pytest.raises(TypeError, match="text"):
        context.metadata["n"] = 1
    context.metadata = {"q": "w"}
    assert dict(context.metadata.items()) == {"q": "w"}
    context.metadata.clear()
    assert len(context.metadata) == 0
    detached = context.detached("b")
    context.stop_generating()
    assert (detached.id(), detached.is_stopped(), context.trace_headers()) == ("b", False, None)
    with context.start_span("stage", {"a": 1}) as span:
        span.set_attribute("k", 1)
    assert len(Context().id()) == 36


# --- items and errors ------------------------------------------------------------------------------------------------


async def test_items_and_envelopes(runtime: DistributedRuntime) -> None:
    async def handler(request: str) -> AsyncIterator[Any]:
        yield {"_dynamo_annotated": True, "data": 1, "event": "ev", "comment": ["c"], "id": "7"}
        yield None
        yield {"plain": True}
        if request == "fail":
            yield {"_dynamo_annotated": True, "event": "error", "comment": ["boom"]}

    client = await connect(runtime, handler)
    first, none, last = await patiently(items_of(client.generate("ok")))
    assert (first.data(), first.event(), first.comments(), first.id()) == (1, "ev", ["c"], "7")
    assert isinstance(none, Annotated)
    assert (none.data(), none.comments(), last.data()) == (None, None, {"plain": True})
    assert repr(none) == "Annotated(data=None, event=None, comment=[], id=None)"
    assert await patiently(items_of(client.generate("ok", annotated=False))) == [1, {"plain": True}]
    with pytest.raises(ValueError, match="boom"):
        await patiently(items_of(client.generate("fail", annotated=None)))


@pytest.mark.parametrize("error", [ValueError("bad"), KeyError("missing"), RuntimeError("oops")], ids=repr)
async def test_a_handlers_error_is_a_value_error(error: Exception, runtime: DistributedRuntime) -> None:
    async def handler(request: Any) -> AsyncIterator[Any]:
        yield 1
        raise error

    client = await connect(runtime, handler)
    with pytest.raises(ValueError, match=type(error).__name__):
        await patiently(items_of(client.generate(1)))


async def test_no_workers_and_unknown_ids_are_value_errors(runtime: DistributedRuntime) -> None:
    client = await runtime.endpoint("t.c.e").client()
    with pytest.raises(WorkerUnavailable, match="No workers available"):
        await patiently(client.generate(1))
    handlers = Counting()
    client = await connect(runtime, handlers.looks)
    with pytest.raises(ValueError, match="12345"):
        await patiently(client.direct(1, 12345))
    for each in (WorkerUnavailable, CannotConnect, Disconnected):
        assert issubclass(each, ValueError)
        assert issubclass(each, dynamo.DynamoException)


async def test_annotations_are_not_enforced(runtime: DistributedRuntime) -> None:
    async def handler(request: int, context: Context) -> AsyncIterator[dict[str, str]]:
        yield {"n": 1}  # type: ignore[dict-item]
        yield request  # type: ignore[misc]

    client = await connect(runtime, handler)
    assert await patiently(items_of(client.generate("text", annotated=False))) == [{"n": 1}, "text"]


async def test_every_form_of_handler(runtime: DistributedRuntime) -> None:
    class Handlers:
        async def method(self, request: Any, context: Any = None) -> AsyncIterator[Any]:
            yield context is not None

        async def positional(self, request: Any, ctx: Any) -> AsyncIterator[Any]:
            yield ctx.is_stopped()

        async def keywords(self, request: Any, **keywords: Any) -> AsyncIterator[Any]:
            yield sorted(keywords)

        async def coroutine(self, request: Any) -> Any:
            return "answer"

        def returns_a_generator(self, request: Any, *, context: Context) -> Any:
            return self.positional(request, context)

    handlers = Handlers()
    expected = {
        "method": True,
        "positional": False,
        "keywords": [],
        "coroutine": "answer",
        "returns_a_generator": False,
    }
    for name, answer in expected.items():
        client = await connect(runtime, getattr(handlers, name), f"t.c.{name}")
        assert await patiently(items_of(client.generate(1, annotated=False))) == [answer]


async def test_handlers_that_cannot_serve_are_refused(runtime: DistributedRuntime) -> None:
    def plain(request: Any) -> Any:
        yield 1

    async def nothing() -> AsyncIterator[Any]:
        yield 1

    endpoint = runtime.endpoint("t.c.e")
    for handler, words in ((plain, "async def"), (nothing, "takes no request"), ("text", "async generator")):
        with pytest.raises(TypeError, match=words):
            endpoint.serve_endpoint(handler)  # type: ignore[arg-type]


# --- pushing ---------------------------------------------------------------------------------------------------------


async def test_a_push_on_the_loop_waits_at_the_handlers_next_await(runtime: DistributedRuntime) -> None:
    sent = 0
    text = "x" * 1000

    async def handler(request: Any, context: Context, response_sender: Any = None) -> AsyncIterator[Any]:
        nonlocal sent
        for _ in range(20_000):
            response_sender.send(text)
            sent += 1
            await asyncio.sleep(0)
        return
        yield  # type: ignore[unreachable]

    client = await connect(runtime, handler)
    stream = await client.generate(1, annotated=False)
    assert await patiently(anext(stream)) == text
    before = -1
    while before != sent:
        before = sent
        await asyncio.sleep(0.05)
    assert before < 5_000
    async with asyncio.timeout(PATIENCE_S):
        assert len([item async for item in stream]) == 19_999


async def test_a_push_without_an_await_is_bounded(runtime: DistributedRuntime) -> None:
    piece = b"x" * (MOST_BYTES // 8)

    async def handler(request: Any, response_sender: Any = None) -> AsyncIterator[Any]:
        for _ in range(10):
            response_sender.send(piece)
        return
        yield  # type: ignore[unreachable]

    client = await connect(runtime, handler)
    with pytest.raises(ValueError, match="`await` between the items"):
        await patiently(items_of(client.generate(1)))


async def test_how_a_pushed_stream_ends(runtime: DistributedRuntime) -> None:
    seen: list[Any] = []

    async def handler(request: str, context: Context, response_sender: Any = None) -> AsyncIterator[Any]:
        response_sender.send({"_dynamo_annotated": True, "data": 1})
        if request == "closes":
            response_sender.close()
            response_sender.close()
            with pytest.raises(RuntimeError, match="close"):
                response_sender.send(2)
        elif request == "reports":
            response_sender.close_with_error("bad thing")
        elif request == "raises":
            raise KeyError("missing")
        elif request == "cannot be encoded":
            with pytest.raises(ValueError, match="cannot be encoded"):
                response_sender.send(object())
        elif request == "yields":
            yield 5
        seen.append(request)

    client = await connect(runtime, handler)
    for request in ("closes", "ends", "cannot be encoded"):
        assert await patiently(items_of(client.generate(request, annotated=False))) == [1]
    await until(lambda: len(seen) == 3)
    for request, words in (("reports", "bad thing"), ("raises", "missing"), ("yields", "pushes its items")):
        got: list[Any] = []
        with pytest.raises(ValueError, match=words):
            async for item in await client.generate(request, annotated=False):
                got.append(item)
        assert got == [1]


async def test_a_handler_that_pushes_is_not_interrupted_and_keeps_its_place(runtime: DistributedRuntime) -> None:
    told = asyncio.Event()
    go_on = asyncio.Event()

    async def handler(request: str, context: Context, response_sender: Any = None) -> AsyncIterator[Any]:
        response_sender.send(1)
        await context.async_killed_or_stopped()
        told.set()
        await go_on.wait()
        return
        yield  # type: ignore[unreachable]

    client = await connect(runtime, handler)
    context = Context()
    async for _ in await client.generate("x", context=context):
        context.stop_generating()
    await patiently(told.wait())
    assert runtime.native.statistics().endpoints[0].running == 1
    go_on.set()
    await until(lambda: runtime.native.statistics().endpoints[0].running == 0)


# --- the rest --------------------------------------------------------------------------------------------------------


async def test_router_modes(runtime: DistributedRuntime, caplog: pytest.LogCaptureFixture) -> None:
    async def handler(request: Any) -> AsyncIterator[Any]:
        yield request

    await connect(runtime, handler)
    for mode in RouterMode:
        client = await runtime.endpoint("t.c.e").client(mode)
        assert await patiently(items_of(client.generate(1, annotated=False))) == [1]
    assert {each.args[1] for each in caplog.records if each.args} == {RouterMode.KV, RouterMode.DeviceAwareWeighted}  # type: ignore[index]
    for call in (client.random, client.round_robin, client.device_aware_weighted):
        assert await patiently(items_of(call(2, annotated=False))) == [2]
    (only,) = client.instance_ids()
    assert await patiently(items_of(client.direct(3, only, annotated=False))) == [3]
    with pytest.raises(TypeError, match="RouterMode"):
        await runtime.endpoint("t.c.e").client("random")  # type: ignore[arg-type]
    with pytest.raises(NotImplementedError, match="update_metadata"):
        await client.wait_for_instance_by_runtime_data("k", "v")


async def test_instances_show_metadata_that_the_worker_changes(runtime: DistributedRuntime) -> None:
    async def handler(request: Any) -> AsyncIterator[Any]:
        yield request

    client = await connect(runtime, handler)
    await runtime.endpoint("t.c.e").native.update_metadata({"device_type": "cuda", "models": ["a"]})
    await until(lambda: client.instances()[0].device_type == "cuda")
    assert client.instances()[0].metadata["models"] == ["a"]


async def test_backends_that_are_not_here(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = asyncio.get_running_loop()
    with pytest.raises(dynamo.DynamoException, match="kubernetes"):
        DistributedRuntime(loop, "kubernetes", "tcp")
    with pytest.raises(TypeError, match="request_plane"):
        DistributedRuntime(loop, "mem", False)  # type: ignore[arg-type]
    monkeypatch.setenv("DYN_DISCOVERY_BACKEND", "kubernetes")
    with pytest.raises(dynamo.DynamoException, match="DYN_DISCOVERY_BACKEND"):
        DistributedRuntime(loop)
    monkeypatch.setenv("DYN_DISCOVERY_BACKEND", "mem")
    monkeypatch.setenv("DYN_RUNTIME_GRACEFUL_SHUTDOWN_TIMEOUT_SECS", "900")
    runtime = DistributedRuntime(loop)
    assert (runtime.native.config.discovery, runtime.native.config.drain_timeout_s) == ("memory", 900)
    await runtime.native.close()
    monkeypatch.setenv("TRD_DISCOVERY", "file")  # This runtime's own setting counts.
    runtime = DistributedRuntime(loop)
    assert runtime.native.config.discovery == "file"
    await runtime.native.close()


def test_modules_have_dynamos_names() -> None:
    for name in ("_core", "runtime", "llm", "llm.exceptions", "runtime.logging"):
        importlib.import_module(f"triton_distributed.compat.dynamo.{name}")
    with pytest.raises(ImportError, match="triton_distributed.llm"):
        from triton_distributed.compat.dynamo.llm import register_model  # noqa: F401


def test_the_worker_decorator_warns_of_its_old_argument() -> None:
    with pytest.warns(DeprecationWarning, match="enable_nats"):
        dynamo.dynamo_worker(enable_nats=True)


# --- metrics ---------------------------------------------------------------------------------------------------------


async def test_labels_and_callbacks_are_on_the_metrics_page(runtime: DistributedRuntime):
    async def words(request: Any) -> AsyncIterator[str]:
        yield request

    endpoint = runtime.endpoint("t.c.e")
    asyncio.ensure_future(endpoint.serve_endpoint(words, metrics_labels=[("model", "m")]))  # noqa: RUF006
    endpoint.metrics.register_prometheus_expfmt_callback(lambda: "# TYPE engine_load gauge\nengine_load 0.5\n")
    endpoint.metrics.register_prometheus_expfmt_callback(lambda: "no metrics")
    client = await endpoint.client()
    await patiently(client.wait_for_instances())
    assert [item.data() for item in await items_of(client.generate("a"))] == ["a"]
    page = await asyncio.to_thread(runtime.native.metrics.text)
    assert 'triton_requests_total{endpoint="t.c.e",model="m",outcome="ok"} 1.0\n' in page
    assert "engine_load 0.5\n" in page
    with pytest.raises(TypeError, match="must be text"):
        endpoint.serve_endpoint(words, metrics_labels=[("model", 7)])  # type: ignore[list-item]
