"""Ids, travelling values and trace contexts reach the calls that handlers make, at any depth."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, cast

import msgspec
import pytest

from tests.runtime.cluster import Cluster, patiently
from triton_distributed.runtime import Context, DistributedRuntime, current_context
from triton_distributed.serving.handler_context import served_context

TRACE = {"traceparent": f"00-{'a' * 32}-{'b' * 16}-01", "tracestate": "vendor=1"}


def seen(context: Context) -> tuple[str, dict[str, Any], dict[str, Any]]:
    return context.id(), dict(context.metadata), dict(context.travelling)


async def chain(cluster: Cluster) -> tuple[list[Any], Any]:
    """Three workers, each of which calls the next one without options; what each one saw, and a client of the first."""
    found: list[Any] = []

    async def last(request: Any, context: Context) -> Any:
        found.append(seen(context))
        return request

    async def middle(request: Any, context: Context) -> AsyncIterator[Any]:
        found.append(seen(context))
        async for item in (await cluster.client("t.c.last")).generate(request, annotated=False):
            yield item

    async def first(request: Any, context: Context) -> Any:
        found.append(seen(context))
        return await (await cluster.client("t.c.middle")).call(request)

    await cluster.worker(last, "t.c.last")
    await cluster.worker(middle, "t.c.middle")
    return found, await cluster.connect(first)


@pytest.mark.any_loop
async def test_one_request_has_one_id_in_all_workers(cluster: Cluster) -> None:
    found, client = await chain(cluster)
    await patiently(client.call(1))
    assert len(found) == 3
    assert len({name for name, _, _ in found}) == 1
    found.clear()
    await patiently(client.call(1, context=Context("REQ-1", {"only": "the first"}, TRACE)))
    assert found == [("REQ-1", {"only": "the first"}, TRACE), ("REQ-1", {}, TRACE), ("REQ-1", {}, TRACE)]


async def test_an_invalid_trace_context_goes_no_further(cluster: Cluster) -> None:
    found, client = await chain(cluster)
    for invalid in ("00-1-2-3", 7, TRACE["traceparent"] + "-more"):
        sent = Context("r", travelling={"traceparent": invalid, "tracestate": "vendor=1", "user": "u1"})
        await patiently(client.call(1, context=sent))
    assert found == [("r", {}, {"user": "u1"})] * 9


async def test_two_requests_at_once_keep_their_own(cluster: Cluster) -> None:
    found, client = await chain(cluster)
    contexts = [Context(f"r{n}", travelling={"n": n}) for n in range(20)]
    await patiently(asyncio.gather(*[client.call(n, context=each) for n, each in enumerate(contexts)]))
    assert sorted(found, key=lambda each: each[2]["n"]) == [(f"r{n}", {}, {"n": n}) for n in range(20) for _ in "123"]


async def test_a_caller_without_any_sends_none(cluster: Cluster) -> None:
    found, client = await chain(cluster)
    await patiently(client.call(1))
    assert [travelling for _, _, travelling in found] == [{}, {}, {}]


async def test_a_handler_adds_values_for_its_own_calls(cluster: Cluster) -> None:
    found: list[Any] = []

    async def inner(request: Any, context: Context) -> None:
        found.append(dict(context.travelling))

    async def outer(request: Any, context: Context) -> None:
        client = await cluster.client("t.c.inner")
        await client.call(1)
        context.travel(user="u2", more=[1, None])
        await client.call(1)
        await client.call(1, metadata={"x": 1})
        await client.call(1, context=Context("another", travelling={"user": "u3"}))

    await cluster.worker(inner, "t.c.inner")
    client = await cluster.connect(outer)
    await patiently(client.call(1, context=Context(travelling={"user": "u1", "tenant": "t"})))
    own = {"user": "u2", "tenant": "t", "more": [1, None]}
    assert found == [{"user": "u1", "tenant": "t"}, own, own, {**own, "user": "u3"}]


async def test_an_unnamed_context_of_a_handler_has_the_id_of_its_request(cluster: Cluster) -> None:
    names: list[str] = []

    async def inner(request: Any, context: Context) -> None:
        names.append(context.id())

    async def outer(request: Any, context: Context) -> None:
        client = await cluster.client("t.c.inner")
        await client.call(1, context=Context())
        await client.call(1, context=Context("own"))

    await cluster.worker(inner, "t.c.inner")
    await patiently((await cluster.connect(outer)).call(1, context=Context("REQ-2")))
    assert names == ["REQ-2", "own"]


async def test_the_stream_and_the_error_of_a_nested_call_have_the_id(cluster: Cluster) -> None:
    async def inner(request: Any) -> None:
        raise KeyError("missing")

    async def outer(request: Any) -> Any:
        stream = (await cluster.client("t.c.inner")).generate(1)
        try:
            await anext(stream)
        except KeyError as error:
            return [stream.request_id, error.request_id]  # type: ignore[attr-defined]

    await cluster.worker(inner, "t.c.inner")
    client = await cluster.connect(outer)
    assert await patiently(client.call(1, context=Context("REQ-3"))) == ["REQ-3", "REQ-3"]


async def test_work_that_outlives_its_request_inherits_nothing(cluster: Cluster) -> None:
    found: list[Any] = []
    answered = asyncio.Event()
    left: list[asyncio.Task[None]] = []

    async def inner(request: Any, context: Context) -> None:
        found.append(seen(context))

    async def outer(request: Any) -> None:
        client = await cluster.client("t.c.inner")

        async def later() -> None:
            await answered.wait()
            await client.call(1)

        left.append(asyncio.create_task(later()))

    await cluster.worker(inner, "t.c.inner")
    await patiently((await cluster.connect(outer)).call(1, context=Context("REQ-4", travelling={"user": "u"})))
    answered.set()
    await patiently(left[0])
    [(name, _, travelling)] = found
    assert name != "REQ-4"
    assert travelling == {}


async def test_a_detached_context_has_its_own_id_and_the_values(cluster: Cluster) -> None:
    found: list[Any] = []

    async def inner(request: Any, context: Context) -> None:
        found.append(seen(context))

    async def outer(request: Any, context: Context) -> None:
        context.travel(step="outer")
        detached = context.detached()
        context.travel(step="later")
        await (await cluster.client("t.c.inner")).call(1, context=detached)

    await cluster.worker(inner, "t.c.inner")
    context = Context("REQ-7", {"m": 1}, {"user": "u"})
    await patiently((await cluster.connect(outer)).call(1, context=context))
    [(name, metadata, travelling)] = found
    assert name != "REQ-7"
    assert (metadata, travelling) == ({"m": 1}, {"user": "u", "step": "outer"})


async def test_a_plain_handler_in_its_thread_sees_and_adds_them(cluster: Cluster) -> None:
    def handler(request: Any, context: Context) -> list[Any]:
        context.travel(**{"in-thread": True})
        now = current_context()
        assert now is context
        return [context.id(), dict(context.travelling)]

    client = await cluster.connect(handler)
    found = await patiently(client.call(1, context=Context("REQ-5", travelling=TRACE)))
    assert found == ["REQ-5", {**TRACE, "in-thread": True}]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"deep": {"it": object()}}, r'travelling\["deep"\]\["it"\]'),
        ({"\0id": "forged"}, "travelling has the key"),
        ({7: "x"}, "travelling has the key 7"),
    ],
)
async def test_values_that_cannot_travel_raise_in_the_call(values: Any, words: str, cluster: Cluster) -> None:
    client = await cluster.connect(lambda request: request)
    with pytest.raises(TypeError, match=words):
        client.generate(1, context=Context(travelling=values))
    assert client.stats.inflight == 0


async def test_values_added_in_a_handler_that_cannot_travel_raise_in_its_call(cluster: Cluster) -> None:
    async def outer(request: Any, context: Context) -> list[str]:
        client, texts = await cluster.client("t.c.inner"), []
        for value in (object(), "x" * 70_000):
            context.travel(value=value)
            try:
                await client.call(1)
            except (TypeError, ValueError) as error:
                texts.append(str(error))
        return texts

    await cluster.worker(lambda request: request, "t.c.inner")
    wrong, large = await patiently((await cluster.connect(outer)).call(1))
    assert 'travelling["value"]' in wrong
    assert "at most 65,536 bytes" in large


@pytest.mark.parametrize("sent", [7, ["user"], {1: "x", "\0id": "forged"}])
async def test_invalid_values_of_a_peer_are_dropped(sent: Any) -> None:
    metadata = msgspec.msgpack.encode({"\0t": sent, "\0id": "REQ", "own": 1})
    assert seen(served_context(cast(Any, None), metadata)) == ("REQ", {"own": 1}, {})


async def test_travelling_that_is_not_a_mapping_is_refused() -> None:
    with pytest.raises(TypeError, match=r"travelling=\['user'\]"):
        Context(travelling=["user"])  # type: ignore[arg-type]


async def test_a_resumed_stream_keeps_them(cluster: Cluster) -> None:
    found: list[Any] = []
    workers: dict[int, DistributedRuntime] = {}

    async def handler(request: Any, context: Context) -> AsyncIterator[int]:
        found.append(seen(context))
        for number in range(context.resume_token or 0, 4):
            context.checkpoint(number + 1)
            yield number
            if number == 1 and len(found) == 1:
                cluster_worker = workers[served[0]]
                for session in list(cluster_worker.worker.server.sessions):
                    session.close("lost by the test")
                await asyncio.Event().wait()

    for _ in range(2):
        worker = await cluster.worker(handler)
        workers[worker.instance_id] = worker
    client = await cluster.client()
    served: list[int] = []

    def policy(request: Any, instances: Any, load: Any) -> Any:
        served.append(instances[0].id)
        return instances[0]

    context = Context("REQ-6", {"m": 1}, {"user": "u"})
    stream = client.generate(1, annotated=False, context=context, resume=True, policy=policy)
    assert await patiently(_all(stream)) == [0, 1, 2, 3]
    assert found == [("REQ-6", {"m": 1}, {"user": "u"})] * 2


async def _all(stream: Any) -> list[Any]:
    return [item async for item in stream]
