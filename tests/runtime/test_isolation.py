"""What one request leaves behind is not another's: context variables, contexts, errors from below."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.runtime.cluster import Cluster, patiently, until
from triton_distributed.errors import InvalidRequest, RemoteError, StreamIncomplete
from triton_distributed.runtime import Context

tenant = contextvars.ContextVar("tenant", default="nobody")


async def test_context_variables_of_a_request_are_not_the_next_ones(cluster: Cluster) -> None:
    async def handler(request: Any) -> str:
        seen = tenant.get()
        tenant.set(f"secret of {request}")
        await asyncio.sleep(0)
        return seen

    client = await cluster.connect(handler, max_inflight=1, max_queue=10)
    assert await patiently(asyncio.gather(*(client.call(n) for n in range(5)))) == ["nobody"] * 5


async def test_what_was_set_before_serving_reaches_every_handler(cluster: Cluster) -> None:
    async def handler(request: Any) -> str:
        return tenant.get()

    token = tenant.set("the house")
    client = await cluster.connect(handler)
    tenant.reset(token)
    assert await patiently(client.call(1)) == "the house"


async def test_a_task_that_outlives_its_handler_acts_for_itself(cluster: Cluster) -> None:
    """As a batcher does that the first request starts: neither its deadline nor its end is the batcher's."""
    go = asyncio.Event()
    tasks: list[asyncio.Task[Any]] = []

    async def inner(request: Any, context: Context) -> float | None:
        return context.remaining_s()

    async def outer(request: Any) -> None:
        async def later() -> Any:
            await go.wait()
            return await below.call(1)

        tasks.append(asyncio.create_task(later()))

    await cluster.worker(inner, "t.c.inner")
    below = await cluster.client("t.c.inner")
    client = await cluster.connect(outer)
    await patiently(client.call(1, timeout=100))
    go.set()
    assert await patiently(tasks[0]) is None


async def test_a_handler_that_kills_its_context_can_be_cancelled_still(cluster: Cluster) -> None:
    ended = asyncio.Event()
    began = asyncio.Event()

    async def handler(request: Any, context: Context) -> AsyncIterator[int]:
        try:
            context.kill()
            began.set()
            yield 1
            await asyncio.get_running_loop().create_future()
        finally:
            ended.set()

    client = await cluster.connect(handler)
    async for _ in client.generate(1):
        break
    await patiently(ended.wait())


async def test_a_handler_that_ignores_its_cancellation_ends_at_its_next_item(cluster: Cluster) -> None:
    more = asyncio.Event()
    began = asyncio.Event()
    yielded: list[int] = []

    async def stubborn(request: Any) -> AsyncIterator[int]:
        n = 0
        while True:
            try:
                began.set()
                await more.wait()
            except asyncio.CancelledError:
                more.set()
            yielded.append(n)
            yield n
            n += 1

    client = await cluster.connect(stubborn)
    stream = client.generate(1)
    await patiently(began.wait())
    stream.cancel()
    await until(lambda: not cluster.served()[0].running)
    assert yielded == [0]
    assert cluster.served()[0].outcomes["cancelled"] == 1


async def test_an_invalid_request_from_below_is_the_handlers_error(cluster: Cluster) -> None:
    async def typed(request: int) -> int:
        return request

    async def outer(request: Any) -> Any:
        return await below.call("no number")

    await cluster.worker(typed, "t.c.inner")
    below = await cluster.client("t.c.inner")
    client = await cluster.connect(outer)
    with pytest.raises(InvalidRequest) as caught:
        await patiently(client.call(1))
    assert isinstance(caught.value, RemoteError)
    assert "outer" in caught.value.remote_traceback
    with pytest.raises(InvalidRequest) as caught:
        await patiently(below.call("no number"))
    assert not isinstance(caught.value, RemoteError)


async def test_a_reader_that_was_cancelled_does_not_find_a_clean_end(cluster: Cluster) -> None:
    async def handler(request: Any) -> AsyncIterator[int]:
        yield 1
        await asyncio.get_running_loop().create_future()

    client = await cluster.connect(handler)
    stream = client.generate(1, annotated=False)
    assert await patiently(anext(stream)) == 1
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(anext(stream), 0.01)
    with pytest.raises(StreamIncomplete, match="its reader was cancelled"):
        await patiently(anext(stream))


@pytest.mark.parametrize("steps", range(12))
async def test_an_endpoint_that_stops_before_a_handler_began_sends_its_request_elsewhere(
    cluster: Cluster, steps: int
) -> None:
    async def here(request: Any) -> str:
        return "here"

    async def there(request: Any) -> str:
        return "there"

    await cluster.worker(there)
    runtime = cluster.runtime()
    serving = await cluster.serve(runtime, here)

    def prefers_here(request: Any, instances: Any, load: Any) -> Any:
        return next((each for each in instances if each.id == runtime.instance_id), instances[0])

    client = await cluster.client(policy=prefers_here)
    await until(lambda: len(client.instance_ids()) == 2)
    call = asyncio.ensure_future(client.call(1))
    for _ in range(steps):
        await asyncio.sleep(0)
    serving.cancel()
    try:
        assert await patiently(call) in ("here", "there")
    except StreamIncomplete:
        pass  # its handler had begun
