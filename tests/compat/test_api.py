"""The names, forms and texts that programs written for the original rely on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pydantic
import pytest

import triton_distributed._core
import triton_distributed.llm
import triton_distributed.runtime
from tests.runtime.cluster import Cluster, drained, into, patiently, turns
from triton_distributed.config import Config
from triton_distributed.runtime import (
    Annotated,
    Client,
    Component,
    DistributedRuntime,
    Endpoint,
    triton_endpoint,
    triton_worker,
)


async def chars(request: str) -> AsyncIterator[str]:
    for char in request:
        if char == "w":
            raise ValueError("w is not allowed")
        yield char


# --- names -----------------------------------------------------------------------------------------------------------


def test_the_alias_module_has_the_same_classes() -> None:
    for name in triton_distributed._core.__all__:
        assert getattr(triton_distributed._core, name) is getattr(triton_distributed.runtime, name)
    for name in ("KvRouter", "KvMetricsPublisher"):
        assert getattr(triton_distributed._core, name) is getattr(triton_distributed.llm, name)
    with pytest.raises(AttributeError, match="no attribute 'KvOther'"):
        triton_distributed._core.KvOther  # noqa: B018
    for name in ("DistributedRuntime", "Client", "Annotated", "Component", "Endpoint", "Namespace"):
        assert name in triton_distributed._core.__all__


@pytest.mark.parametrize(
    ("namespace", "component", "name"),
    [
        ("triton-init", "backend", "triton_init_backend_720278f8"),
        ("examples/pipeline", "frontend", "examples_pipeline_frontend_d5248d53"),
        ("test-nixl", "prefill", "test_nixl_prefill_9b22676e"),
        ("Ns-A", "Comp.B", "ns_a_comp_b_6188540c"),
    ],
)
async def test_service_names_and_event_subjects(namespace: str, component: str, name: str, cluster: Cluster) -> None:
    made = cluster.runtime().namespace(namespace).component(component)
    assert made.service_name() == name
    assert made.event_subject("kv_events") == f"{name}.events.kv_events"


async def test_plain_calls_make_names(cluster: Cluster) -> None:
    runtime = cluster.runtime()
    component = runtime.namespace("ns").component("comp")
    assert isinstance(component, Component)
    assert isinstance(component.endpoint("ep"), Endpoint)
    assert runtime.event_loop() is asyncio.get_running_loop()
    same = (component.endpoint("ep"), runtime.endpoint("ns.comp.ep"), runtime.endpoint("dyn://ns.comp.ep"))
    assert len({each.name for each in same}) == 1
    for bad in ("ns.comp", "ns.comp.ep.more", "", "dyn://", "ns..ep"):
        with pytest.raises(ValueError, match="name"):
            runtime.endpoint(bad)


async def test_lease_id_is_an_int_that_names_the_instance(cluster: Cluster) -> None:
    worker = await cluster.worker(chars)
    client = await cluster.client()
    endpoint = worker.endpoint("t.c.e")
    assert type(endpoint.lease_id()) is int
    assert 0 < endpoint.lease_id() < 2**63
    assert client.endpoint_ids() == [endpoint.lease_id()] == client.instance_ids()
    assert worker.endpoint("t.c.other").lease_id() == endpoint.lease_id()


async def test_create_service_is_awaitable_and_legal_at_any_time(cluster: Cluster) -> None:
    runtime, other = cluster.runtime(), cluster.runtime()
    for each in (runtime, other, runtime):
        assert await each.namespace("ns").component("alone").create_service() is None  # type: ignore[func-returns-value]


@pytest.mark.parametrize("name", ["chat/completions", "a/b/c", "/", "with space", "ü", "dots.in.it", "v1:generate"])
async def test_names_of_all_sorts_are_served_and_called(name: str, unix: Cluster) -> None:
    def endpoint(runtime: DistributedRuntime) -> Endpoint:
        return runtime.namespace("examples/pipeline").component("Comp.B").endpoint(name)

    endpoint(unix.runtime()).serve_endpoint(chars)
    client = await endpoint(unix.caller).client()
    await patiently(client.wait_for_endpoints())
    assert await patiently(drained(client.generate("abc", annotated=False))) == ["a", "b", "c"]


async def test_a_name_that_begins_another_is_another(cluster: Cluster) -> None:
    await cluster.worker(chars, "t.c.generate2")
    client = await cluster.caller.endpoint("t.c.generate").client()
    assert client.endpoint_ids() == []
    with pytest.raises(Exception, match="no endpoints found"):
        await client.generate("a")


# --- real futures ----------------------------------------------------------------------------------------------------


@pytest.mark.any_loop
async def test_waiting_for_endpoints_is_a_future(cluster: Cluster) -> None:
    client = await cluster.caller.endpoint("t.c.e").client()
    assert isinstance(client, Client)
    waiting = client.wait_for_endpoints()
    assert asyncio.isfuture(waiting)
    await turns()
    assert waiting.done() is False
    await cluster.worker(chars)
    await patiently(waiting)
    assert waiting.done() is True


async def test_a_wait_that_is_never_awaited_is_quiet_at_the_end(cluster: Cluster) -> None:
    client = await cluster.caller.endpoint("t.c.nobody").client()
    waiting = client.wait_for_endpoints()
    await turns()
    assert not waiting.done()


async def test_serving_is_a_future_that_begins_by_itself(cluster: Cluster) -> None:
    runtime = cluster.runtime()
    serving = runtime.endpoint("t.c.e").serve_endpoint(chars, graceful_shutdown=True, metrics_labels=[("model", "m")])
    assert asyncio.isfuture(serving)
    client = await cluster.client()  # nobody has awaited it
    assert "".join(await patiently(drained(client.generate("abc", annotated=False)))) == "abc"
    runtime.shutdown()
    assert await patiently(serving) is None  # type: ignore[func-returns-value]


async def test_a_client_is_filled_when_it_is_there(cluster: Cluster) -> None:
    await cluster.worker(chars)
    fresh = cluster.runtime()
    client = await fresh.endpoint("t.c.e").client()
    assert len(client.endpoint_ids()) == 1  # programs call at once, without waiting
    stream = await client.generate("abc")
    assert len(await patiently(drained(stream))) == 3


async def test_a_call_that_is_never_awaited_runs(cluster: Cluster) -> None:
    seen: asyncio.Queue[str] = asyncio.Queue()

    async def handler(request: str) -> AsyncIterator[str]:
        seen.put_nowait(request)
        yield "dropped"

    client = await cluster.connect(handler)
    client.generate("one")
    _ = client.round_robin("two")
    assert {await patiently(seen.get()), await patiently(seen.get())} == {"one", "two"}


async def test_gather_and_a_stream_that_is_read_later(cluster: Cluster) -> None:
    client = await cluster.connect(chars)
    streams = await asyncio.gather(*[client.generate(word) for word in ("abc", "def")])
    for _ in range(5):
        await patiently(drained(client.generate("xyz")))
    assert ["".join([each.data() async for each in stream]) for stream in streams] == ["abc", "def"]


# --- items -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("item", "text"),
    [
        (Annotated("h"), "Annotated(data='h', event=None, comment=[], id=None)"),
        (Annotated(None, "error", ["bad"], "1"), "Annotated(data=None, event='error', comment=['bad'], id='1')"),
        (Annotated({"a": 1}), "Annotated(data={'a': 1}, event=None, comment=[], id=None)"),
    ],
)
def test_repr_of_an_item(item: Annotated, text: str) -> None:
    assert repr(item) == text == str(item)


def test_parts_of_an_item_by_method_and_by_name() -> None:
    item = Annotated("data", "event", ["one"], "7")
    assert (item.data(), item.event(), item.comments(), item.id(), item.is_error()) == (
        "data",
        "event",
        ["one"],
        "7",
        False,
    )
    for name, value in {"data": "data", "event": "event", "comment": ["one"], "comments": ["one"], "id": "7"}.items():
        assert item.get(name) == value
    assert Annotated().comments() == []
    with pytest.raises(ValueError, match="nothing"):
        item.get("nothing")


async def test_an_item_without_data(cluster: Cluster) -> None:
    async def handler(request: Any) -> AsyncIterator[Any]:
        yield "a"
        yield None
        yield "b"

    client = await cluster.connect(handler)
    assert [each.data() for each in await patiently(drained(client.generate(1)))] == ["a", None, "b"]
    assert await patiently(drained(client.generate(1, annotated=False))) == ["a", "b"]
    assert await patiently(drained(client.generate(1, annotated=None))) == ["a", "b"]


# --- texts -----------------------------------------------------------------------------------------------------------


@pytest.mark.any_loop
async def test_an_error_of_the_handler(cluster: Cluster) -> None:
    client = await cluster.connect(chars)
    found: list[Any] = []
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        await into(found, await client.generate("hello world", annotated=False))
    assert "".join(found) == "hello "
    assert "ValueError: w is not allowed" in str(caught.value)


async def test_an_error_of_another_type_is_a_value_error_too(cluster: Cluster) -> None:
    async def handler(request: Any) -> AsyncIterator[Any]:
        yield 1
        raise KeyError("w")

    client = await cluster.connect(handler)
    with pytest.raises(ValueError, match="KeyError"):
        await patiently(drained(client.generate(1)))


async def test_nobody_and_nobody_of_that_id(cluster: Cluster) -> None:
    endpoint = cluster.caller.namespace("triton-init").component("backend").endpoint("generate")
    client = await endpoint.client()
    text = 'no endpoints found for endpoint "triton-init/components/backend/generate"'
    for method in (client.generate, client.round_robin, client.random):
        with pytest.raises(Exception, match=text):
            await method("hello")
    with pytest.raises(
        Exception, match='endpoint_id=42 not found for endpoint "triton-init/components/backend/generate"'
    ):
        await client.direct("hello", 42)


# --- decorators and loops --------------------------------------------------------------------------------------------


@pytest.fixture
def in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRD_DISCOVERY", "memory")
    monkeypatch.setenv("TRD_HANDLE_SIGNALS", "0")


@pytest.mark.usefixtures("in_memory")
async def test_triton_worker_passes_arguments_through_and_shuts_down() -> None:
    made = []

    @triton_worker()
    async def worker(runtime: DistributedRuntime, first: int, *rest: int, key: str = "") -> tuple[Any, ...]:
        """Its own words."""
        made.append(runtime)
        return (first, rest, key)

    assert await worker(1, 2, 3, key="k") == (1, (2, 3), "k")
    assert worker.__name__ == "worker"
    assert worker.__doc__ == "Its own words."
    assert "closed" in repr(made[0])

    @triton_worker()
    async def raises(runtime: DistributedRuntime) -> None:
        made.append(runtime)
        raise LookupError("mine")

    with pytest.raises(LookupError, match="mine"):
        await raises()
    assert "closed" in repr(made[1])


@pytest.mark.usefixtures("in_memory")
async def test_triton_worker_that_returns_while_it_serves() -> None:
    @triton_worker()
    async def worker(runtime: DistributedRuntime) -> list[str]:
        serving = runtime.endpoint("t.c.e").serve_endpoint(chars)
        client = await runtime.endpoint("t.c.e").client()
        await client.wait_for_endpoints()
        items = [each.data() async for each in await client.generate("abc")]
        runtime.shutdown()
        assert await serving is None  # type: ignore[func-returns-value]
        return items

    assert await patiently(worker()) == ["a", "b", "c"]


@pytest.mark.usefixtures("in_memory")
@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_programs_run_under_both_loops(loop: str) -> None:
    @triton_worker()
    async def worker(runtime: DistributedRuntime) -> str:
        runtime.endpoint("t.c.e").serve_endpoint(chars)
        client = await runtime.endpoint("t.c.e").client()
        await client.wait_for_endpoints()
        return "".join([each.data() async for each in client.generate("abc")])

    if loop == "uvloop":
        uvloop = pytest.importorskip("uvloop")
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            assert runner.run(worker()) == "abc"
    else:
        assert asyncio.run(worker()) == "abc"
        assert asyncio.run(worker()) == "abc"


@pytest.mark.usefixtures("in_memory")
async def test_two_runtimes_are_legal() -> None:
    one = DistributedRuntime(asyncio.get_running_loop())
    other = DistributedRuntime(asyncio.get_running_loop())
    serving = one.endpoint("t.c.e").serve_endpoint(chars)
    client = await other.endpoint("t.c.e").client()
    await patiently(client.wait_for_endpoints())
    assert await patiently(drained(client.generate("a", annotated=False))) == ["a"]
    other.shutdown()
    one.shutdown()
    assert await patiently(serving) is None  # type: ignore[func-returns-value]
    await other.close()


async def test_a_failure_to_connect_surfaces_with_its_address(tmp_path: Any) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    runtime = DistributedRuntime(asyncio.get_running_loop(), config=Config(directory=blocked / "below"))
    with pytest.raises(Exception, match=str(blocked)):
        await runtime.endpoint("t.c.e").client()
    with pytest.raises(Exception, match=str(blocked)):
        await runtime.endpoint("t.c.e").serve_endpoint(chars)
    await runtime.close()


async def test_a_bad_typed_request_is_a_value_error(cluster: Cluster) -> None:
    class Request(pydantic.BaseModel):
        data: str

    class Handler:
        @triton_endpoint(Request, str)
        async def generate(self, request: Any) -> AsyncIterator[str]:
            yield request.data

    client = await cluster.connect(Handler().generate)
    for good in (Request(data="x").model_dump_json(), {"data": "x"}):
        assert await patiently(drained(client.generate(good, annotated=False))) == ["x"]
    with pytest.raises(ValueError, match="Invalid request"):
        await patiently(drained(client.generate({"data": 5})))


async def test_an_answer_as_text_beside_a_model_passes(cluster: Cluster) -> None:
    """Programs answer with a model's JSON, or with plain text: the response model was never looked at."""

    class Request(pydantic.BaseModel):
        text: str

    class Response(pydantic.BaseModel):
        char: str

    class Handler:
        @triton_endpoint(Request, Response)
        async def generate(self, request: Any) -> Any:
            for char in request.text:
                yield Response(char=char).model_dump_json()
                yield char
                yield Response(char=char)

    client = await cluster.connect(Handler().generate)
    items = [each.data() async for each in await client.generate(Request(text="h").model_dump_json())]
    assert items == ['{"char":"h"}', "h", {"char": "h"}]
