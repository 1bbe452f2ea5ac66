"""Runtimes of one test, and what tests of the runtime wait for."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, TypeVar

import pytest

from tests.timing import PATIENCE_S
from triton_distributed.config import Config
from triton_distributed.runtime import Client, DistributedRuntime, EndpointStatistics

T = TypeVar("T")


async def patiently(awaitable: Awaitable[T]) -> T:
    """Wait for something that must happen."""
    return await asyncio.wait_for(_of(awaitable), PATIENCE_S)


async def _of(awaitable: Awaitable[T]) -> T:
    return await awaitable


def longer(first_s: float) -> Iterator[float]:
    """Time limits for a call that must get somewhere before its time is over: tried until one of them is enough.

    A short limit makes the test fast. On a busy machine it is over too soon, and the next is four times as long.
    """
    while first_s < PATIENCE_S:
        yield first_s
        first_s *= 4
    pytest.fail(f"{PATIENCE_S:g} s were not enough")


async def turns(count: int = 20) -> None:
    """Let everything that is ready run, for tests that something does NOT happen."""
    for _ in range(count):
        await asyncio.sleep(0)


async def drained(stream: Any) -> list[Any]:
    """All items of a stream."""
    return [item async for item in stream]


async def into(items: list[Any], stream: Any) -> None:
    """Read a stream to its end, and keep what came before an error."""
    async with asyncio.timeout(PATIENCE_S):
        async for item in stream:
            items.append(item)  # one by one: a comprehension would lose them


async def until(true: Callable[[], object]) -> None:
    """Turn the loop until something that must come true is."""
    async with asyncio.timeout(PATIENCE_S):
        while not true():
            await asyncio.sleep(0.001)


class Cluster:
    """Makes runtimes that find each other, and closes them.

    Args:
        settings: of every runtime; by default they share this loop's memory discovery and take no signals.
    """

    def __init__(self, **settings: Any) -> None:
        self._settings = {"discovery": "memory", "handle_signals": False, "drain_timeout_s": PATIENCE_S / 4, **settings}
        self._runtimes: list[DistributedRuntime] = []
        self._caller: DistributedRuntime | None = None

    def runtime(self, **settings: Any) -> DistributedRuntime:
        made = DistributedRuntime(asyncio.get_running_loop(), config=Config(**{**self._settings, **settings}))
        self._runtimes.append(made)
        return made

    @property
    def caller(self) -> DistributedRuntime:
        """The runtime that calls: it serves nothing."""
        if self._caller is None:
            self._caller = self.runtime()
        return self._caller

    def served(self) -> list[EndpointStatistics]:
        """What all runtimes of the cluster serve at this moment."""
        return [endpoint for runtime in self._runtimes for endpoint in runtime.statistics().endpoints]

    async def worker(self, handler: Any, name: str = "t.c.e", **options: Any) -> DistributedRuntime:
        """A runtime of its own that serves `handler`; registered when this returns."""
        runtime = self.runtime()
        await self.serve(runtime, handler, name, **options)
        return runtime

    async def serve(
        self, runtime: DistributedRuntime, handler: Any, name: str = "t.c.e", **options: Any
    ) -> asyncio.Task[None]:
        """Serve one more endpoint on `runtime`; registered when this returns."""
        task = runtime.endpoint(name).serve_endpoint(handler, **options)
        client = await self.caller.endpoint(name).client()

        def settled() -> bool:
            return task.done() or runtime.instance_id in client.instance_ids()

        await until(settled)
        if task.done():
            task.result()
        return task

    async def client(self, name: str = "t.c.e", **options: Any) -> Client:
        """A client of an endpoint that is served."""
        client = await self.caller.endpoint(name).client(**options)
        await patiently(client.wait_for_instances())
        return client

    async def connect(self, handler: Any, **options: Any) -> Client:
        """A client of a fresh worker that serves `handler`."""
        await self.worker(handler, **options)
        return await self.client()

    async def close(self) -> None:
        """Close the caller first, so that no handler waits for somebody to read."""
        if self._caller is not None:
            await self._caller.close()
        await asyncio.gather(*(each.close() for each in self._runtimes))
