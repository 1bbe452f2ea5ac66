"""A batch function that records its batches, and what tests of batches share."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from triton_distributed.runtime import Context
from triton_distributed.testing import run_in_virtual_time

T = Any


def virtually(program: Coroutine[Any, Any, T]) -> T:
    """Run a test in virtual time: a wait takes no time, and times are exact."""
    return run_in_virtual_time(program)


class Model:
    """A batch function that records its batches, and takes `takes_s` for each.

    Attributes:
        batches: (seconds since the test began, the requests) of each batch.
        cancelled: how many batches were cancelled.
    """

    def __init__(self, takes_s: float = 1.0) -> None:
        self.takes_s = takes_s
        self.began = asyncio.get_running_loop().time()
        self.batches: list[tuple[float, list[Any]]] = []
        self.cancelled = 0

    async def __call__(self, requests: list[Any]) -> list[Any]:
        self.batches.append((round(asyncio.get_running_loop().time() - self.began, 6), list(requests)))
        try:
            await asyncio.sleep(self.takes_s)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return [-each for each in requests]

    @property
    def sizes(self) -> list[int]:
        return [len(requests) for _, requests in self.batches]


async def each(*calls: Coroutine[Any, Any, Any]) -> list[Any]:
    return await asyncio.gather(*calls, return_exceptions=True)


async def later(seconds: float, call: Coroutine[Any, Any, Any]) -> Any:
    await asyncio.sleep(seconds)
    return await call


def prioritized(priority: int, **metadata: Any) -> Context:
    context = Context(metadata=metadata)
    context.priority = priority
    return context
