"""Runtimes of one test, and what tests of the runtime wait for."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, TypeVar

import pytest

from tests.timing import PATIENCE_S
from triton_distributed.config import Config
from triton_distributed.runtime import Client, DistributedRuntime, EndpointStatistics
from triton_distributed.testing import LocalCluster

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
    """A `LocalCluster` whose endpoints have a name by default, and that is closed by its test.

    Args:
        settings: of every runtime; by default they share this loop's memory discovery and take no signals.
    """

    def __init__(self, **settings: Any) -> None:
        defaults = {"watchdog_s": Config().watchdog_s, "drain_timeout_s": PATIENCE_S / 4}
        self._local = LocalCluster(**{**defaults, **settings})
        self.runtime, self.close = self._local.runtime, self._local.close

    @property
    def runtimes(self) -> list[DistributedRuntime]:
        return self._local.runtimes

    @property
    def caller(self) -> DistributedRuntime:
        """The runtime that calls: it serves nothing."""
        return self._local.caller

    def served(self) -> list[EndpointStatistics]:
        """What all runtimes of the cluster serve at this moment."""
        return [endpoint for runtime in self.runtimes for endpoint in runtime.statistics().endpoints]

    async def worker(self, handler: Any, name: str = "t.c.e", **options: Any) -> DistributedRuntime:
        """A runtime of its own that serves `handler`; registered when this returns."""
        return await self._local.worker(name, handler, **options)

    async def serve(
        self, runtime: DistributedRuntime, handler: Any, name: str = "t.c.e", **options: Any
    ) -> asyncio.Task[None]:
        """Serve one more endpoint on `runtime`; registered when this returns."""
        return await self._local.serve(runtime, name, handler, **options)

    async def client(self, name: str = "t.c.e", **options: Any) -> Client:
        """A client of an endpoint that is served."""
        return await self._local.client(name, **options)

    async def connect(self, handler: Any, **options: Any) -> Client:
        """A client of a fresh worker that serves `handler`."""
        await self.worker(handler, **options)
        return await self.client()
