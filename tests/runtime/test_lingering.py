"""Handlers that go on after their cancellation: the log names each, and a shutdown does not wait for them for ever."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.runtime.cluster import Cluster, patiently, turns
from triton_distributed.config import Config
from triton_distributed.runtime import DistributedRuntime, triton_endpoint
from triton_distributed.serving.lingering import LINGER_S
from triton_distributed.testing import run_in_virtual_time

CONFIG = Config(discovery="memory", handle_signals=False, watchdog_s=0, drain_timeout_s=5)


class Swallows:
    """Handlers that take their cancellation for nothing, until `release`."""

    def __init__(self) -> None:
        self.release = asyncio.Event()
        self.began = asyncio.Event()

    async def _stays(self) -> None:
        self.began.set()
        while not self.release.is_set():
            try:
                await self.release.wait()
            except asyncio.CancelledError:
                pass

    async def coroutine(self, request: Any) -> None:
        await self._stays()

    async def generator(self, request: Any) -> AsyncIterator[int]:
        yield 1
        await self._stays()

    async def nested(self, request: Any) -> AsyncIterator[int]:
        async for item in self.generator(request):
            yield item

    @triton_endpoint(int, object)
    async def checked(self, request: Any) -> AsyncIterator[int]:
        yield 1
        await self._stays()

    async def returns_a_generator(self, request: Any) -> AsyncIterator[int]:
        return self.generator(request)


# The function that the log must name: a generator within a generator is as far as one can see.
KINDS = {
    "coroutine": "_stays",
    "generator": "_stays",
    "nested": "nested",
    "checked": "_stays",
    "returns_a_generator": "_stays",
}


async def _left(kind: str, handlers: Swallows, after_s: float) -> DistributedRuntime:
    """A caller leaves a handler that goes on; returns its worker `after_s` later."""
    runtime = DistributedRuntime(config=CONFIG)
    runtime.endpoint("t.c.e").serve_endpoint(getattr(handlers, kind))
    client = await runtime.endpoint("t.c.e").client()
    await client.wait_for_instances()
    stream = client.generate(1, annotated=False)
    reading = asyncio.ensure_future(anext(stream))
    if kind != "coroutine":
        await reading
        reading = asyncio.ensure_future(anext(stream))
    await handlers.began.wait()
    await turns()
    reading.cancel()
    await asyncio.wait([reading])
    await asyncio.sleep(after_s)
    return runtime


@pytest.mark.parametrize("kind", KINDS)
def test_a_handler_that_runs_on_is_a_line_in_the_log(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        handlers = Swallows()
        runtime = await _left(kind, handlers, LINGER_S - 1)
        early = caplog.text
        await asyncio.sleep(102)
        handlers.release.set()
        await runtime.close()
        assert "stands at" not in early

    with caplog.at_level(logging.WARNING):
        run_in_virtual_time(main())
    [line] = [each.getMessage() for each in caplog.records if "stands at" in each.getMessage()]  # said once
    assert "of t.c.e: handler Swallows." in line
    assert f"in {KINDS[kind]}, 10 s after its cancellation" in line
    assert "test_lingering.py:" in line


def test_a_handler_that_ends_in_time_is_no_line(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        handlers = Swallows()
        runtime = await _left("generator", handlers, LINGER_S - 1)
        handlers.release.set()
        await asyncio.sleep(100)
        await runtime.close()

    with caplog.at_level(logging.WARNING):
        run_in_virtual_time(main())
    assert caplog.text == ""


def test_many_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        handlers = Swallows()
        runtime = DistributedRuntime(config=CONFIG)
        runtime.endpoint("t.c.e").serve_endpoint(handlers.coroutine)
        client = await runtime.endpoint("t.c.e").client()
        await client.wait_for_instances()
        calls = [asyncio.ensure_future(client.call(n)) for n in range(50)]
        await asyncio.sleep(1)
        for each in calls:
            each.cancel()
        await asyncio.sleep(LINGER_S + 1)
        handlers.release.set()
        await runtime.close()

    with caplog.at_level(logging.WARNING):
        run_in_virtual_time(main())
    assert caplog.text.count("stands at") == 20
    assert "30 more handlers run on after their cancellation" in caplog.text


def test_a_shutdown_does_not_wait_for_it_and_names_it(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> float:
        handlers = Swallows()
        runtime = DistributedRuntime(config=CONFIG)
        serving = runtime.endpoint("t.c.e").serve_endpoint(handlers.generator)
        client = await runtime.endpoint("t.c.e").client()
        await client.wait_for_instances()
        stream = client.generate(1, annotated=False)
        await anext(stream)
        await asyncio.sleep(0)
        began = asyncio.get_running_loop().time()
        runtime.shutdown()
        await serving
        took_s = asyncio.get_running_loop().time() - began
        handlers.release.set()
        stream.cancel()
        await asyncio.sleep(1)
        return took_s

    with caplog.at_level(logging.WARNING):
        took_s = run_in_virtual_time(main())
    assert CONFIG.drain_timeout_s <= took_s < CONFIG.drain_timeout_s + 10
    assert "1 request(s) were cancelled after 5 s" in caplog.text
    assert "handler Swallows.generator stands at" in caplog.text
    assert "although it was cancelled" in caplog.text


async def test_a_request_iterator_that_swallows_its_cancellation_does_not_hold_a_shutdown_up(cluster: Cluster) -> None:
    release = asyncio.Event()

    async def requests() -> AsyncIterator[int]:
        yield 1
        while not release.is_set():
            try:
                await release.wait()
            except asyncio.CancelledError:
                pass

    async def handler(request: AsyncIterator[int]) -> AsyncIterator[int]:
        async for each in request:
            yield each

    await cluster.worker(handler)
    runtime = cluster.runtime()
    client = await runtime.endpoint("t.c.e").client()
    stream = client.generate(requests(), annotated=False)
    assert await patiently(anext(stream)) == 1
    await patiently(runtime.close())
    release.set()
    with pytest.raises(Exception):  # noqa: B017, PT011
        await patiently(anext(stream))
