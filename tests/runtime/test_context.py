"""What a handler knows of its request."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.runtime.cluster import Cluster, drained, patiently
from triton_distributed.runtime import Context, current_context


async def about(request: Any, context: Context) -> dict[str, Any]:
    return {"id": context.id(), "metadata": dict(context.metadata), "left": context.remaining_s()}


@pytest.mark.any_loop
async def test_metadata_and_id_travel(cluster: Cluster) -> None:
    client = await cluster.connect(about)
    context = Context("my-request", {"user": "u", "priority": 3})
    found = await patiently(client.call(1, context=context))
    assert found == {"id": "my-request", "metadata": {"user": "u", "priority": 3}, "left": None}
    found = await patiently(client.call(1, context=context, metadata={"priority": 4, "more": [1, None]}))
    assert found["metadata"] == {"user": "u", "priority": 4, "more": [1, None]}
    found = await patiently(client.call(1, metadata={"alone": True}))
    assert found["metadata"] == {"alone": True}


async def test_a_handler_cannot_change_the_metadata_whether_the_caller_sent_some_or_not(cluster: Cluster) -> None:
    async def handler(request: Any, context: Context) -> str:
        try:
            context.metadata["new"] = 1  # type: ignore[index]
        except TypeError:
            return "refused"
        return "changed"

    client = await cluster.connect(handler)
    assert await patiently(client.call(1)) == "refused"
    assert await patiently(client.call(1, metadata={"user": "u"})) == "refused"


async def test_without_any_there_is_an_id_and_no_metadata(cluster: Cluster) -> None:
    client = await cluster.connect(about)
    found = [await patiently(client.call(1)) for _ in range(3)]
    assert len({each["id"] for each in found}) == 3
    assert all(each["metadata"] == {} for each in found)


async def test_the_stream_knows_the_handlers_id(cluster: Cluster) -> None:
    client = await cluster.connect(about)
    stream = client.generate(1, annotated=False)
    assert [each["id"] for each in await patiently(drained(stream))] == [stream.request_id]
    stream = client.generate(1, annotated=False, context=Context("mine"))
    assert [each["id"] for each in await patiently(drained(stream))] == ["mine"] == [stream.request_id]


async def test_a_made_up_id_is_the_same_at_both_ends(cluster: Cluster) -> None:
    client = await cluster.connect(about)
    context = Context()
    assert (await patiently(client.call(1, context=context)))["id"] == context.id()


async def test_passing_the_context_on_passes_its_id_and_metadata(cluster: Cluster) -> None:
    await cluster.worker(about, "t.c.inner")

    async def outer(request: Any, context: Context) -> Any:
        client = await cluster.client("t.c.inner")
        return [await client.call(1, context=context), await client.call(1)]

    client = await cluster.connect(outer)
    with_it, without = await patiently(client.call(1, context=Context("outer", {"k": "v"})))
    assert (with_it["id"], with_it["metadata"]) == ("outer", {"k": "v"})
    assert (without["id"], without["metadata"]) == ("outer", {})


@pytest.mark.parametrize("bad", [{"k": object()}, {"k": {1j}}])
async def test_metadata_that_cannot_travel_raises_in_the_call(bad: Any, cluster: Cluster) -> None:
    client = await cluster.connect(about)
    with pytest.raises(TypeError):
        client.generate(1, metadata=bad)
    assert client.stats.inflight == 0


@pytest.mark.any_loop
async def test_the_current_context_is_the_handlers_own(cluster: Cluster) -> None:
    async def agen(request: Any, context: Context) -> AsyncIterator[bool]:
        yield current_context() is context
        await asyncio.sleep(0)
        yield current_context() is context
        yield await asyncio.create_task(_is(context))

    def function(request: Any, context: Context) -> bool:
        return current_context() is context

    def generator(request: Any, context: Context) -> Any:
        for _ in range(200):
            yield current_context() is context

    for name, handler in {"t.c.a": agen, "t.c.f": function, "t.c.g": generator}.items():
        await cluster.worker(handler, name)
        client = await cluster.client(name)
        streams = [client.generate(1, annotated=False) for _ in range(5)]
        for stream in streams:
            assert set(await patiently(drained(stream))) == {True}
    assert current_context() is None


async def _is(context: Context) -> bool:
    return current_context() is context


async def test_stop_passes_through_a_handlers_own_calls(cluster: Cluster) -> None:
    async def inner(request: Any, context: Context) -> AsyncIterator[str]:
        yield "inner"
        await context.stopped()
        yield "inner stopped"

    async def outer(request: Any, context: Context) -> AsyncIterator[Any]:
        async for item in (await cluster.client("t.c.inner")).generate(1, annotated=False):
            yield item
        yield "outer ends"

    await cluster.worker(inner, "t.c.inner")
    client = await cluster.connect(outer)
    context = Context()
    items = []
    async for item in client.generate(1, annotated=False, context=context):
        items.append(item)
        context.stop_generating()
    assert items == ["inner", "inner stopped", "outer ends"]


async def test_kill_cancels_every_call_made_with_the_context(cluster: Cluster) -> None:
    ended = []

    async def handler(request: Any) -> AsyncIterator[int]:
        try:
            yield 1
            await asyncio.Event().wait()
        finally:
            ended.append(request)
            if len(ended) == 3:
                all_ended.set()

    all_ended = asyncio.Event()
    client = await cluster.connect(handler)
    context = Context()
    streams = [client.generate(n, context=context) for n in range(3)]
    for each in streams:
        await patiently(anext(each))
    context.kill()
    await patiently(all_ended.wait())
    assert context.is_killed()
    assert context.is_stopped()
    assert "killed" in repr(context)


async def test_waiting_for_a_stop_that_has_come_already(cluster: Cluster) -> None:
    context = Context()
    waiting = asyncio.create_task(context.stopped())
    other = asyncio.create_task(context.async_killed_or_stopped())
    await asyncio.sleep(0)
    context.stop_generating()
    await patiently(asyncio.gather(waiting, other, context.stopped()))
    assert not context.is_killed()


async def test_metadata_keys_that_are_not_text_raise_in_the_call(cluster: Cluster) -> None:
    client = await cluster.connect(about)
    with pytest.raises(TypeError, match="metadata"):
        client.generate(1, metadata={1: 2, "k": "v"})  # type: ignore[dict-item]  # else the worker drops all of it without a word
    assert client.stats.inflight == 0
