"""Calls that are under way when their own runtime is shut down: each ends, and says why."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.runtime.cluster import Cluster, drained, patiently, turns
from tests.runtime.fakes import FakeWorker
from triton_distributed.errors import RuntimeClosed, StreamIncomplete


@pytest.mark.parametrize("options", [{}, {"resume": True}, {"idempotent": True}], ids=str)
@pytest.mark.parametrize("accepts", [False, True])
async def test_a_call_under_way_ends_with_its_runtime(cluster: Cluster, options: dict[str, Any], accepts: bool) -> None:
    sent = asyncio.Event()

    def keeps(stream: Any) -> None:
        sent.set()
        if accepts:
            stream.session.accept(stream, lambda: None)

    fake = await FakeWorker(keeps).start(5)
    client = await cluster.client()
    reading = asyncio.create_task(drained(client.generate(1, **options)))
    await patiently(sent.wait())
    await turns(5)
    await cluster.caller.close()
    with pytest.raises((RuntimeClosed, StreamIncomplete)) as caught:
        await patiently(reading)
    assert isinstance(caught.value, StreamIncomplete) == (accepts and not options)
    assert client.stats.inflight == 0
    await fake.close()


async def test_a_call_that_was_on_its_way_ends_with_its_runtime(cluster: Cluster) -> None:
    fake = await FakeWorker(lambda stream: None).start(5)
    client = await cluster.client()
    stream = client.generate(1)  # to be sent by a task that has not begun
    await cluster.caller.close()
    with pytest.raises(RuntimeClosed):
        await patiently(drained(stream))
    assert client.stats.inflight == 0
    await fake.close()
