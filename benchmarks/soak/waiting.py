"""Event loops by name, and waiting for what must happen."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import uvloop

LOOPS: dict[str, Callable[[Any], Any]] = {"asyncio": asyncio.run, "uvloop": uvloop.run}
# Discovery through etcd forgets a killed worker after its lease of 10 s; nothing else takes a tenth of this.
PATIENCE_S = 30.0

T = TypeVar("T")


async def patiently(awaitable: Awaitable[T]) -> T:
    """What must come.

    Raises:
        TimeoutError: it has not come within `PATIENCE_S`.
    """
    async with asyncio.timeout(PATIENCE_S):
        return await awaitable


async def until(true: Callable[[], object], what: str) -> None:
    """Wait until something that must come true is.

    Raises:
        TimeoutError: it is not within `PATIENCE_S`; says `what` was waited for.
    """
    end = time.monotonic() + PATIENCE_S
    while not true():
        if time.monotonic() > end:
            raise TimeoutError(f"not within {PATIENCE_S:g} s: {what}")
        await asyncio.sleep(0.01)
