"""Waits for events that must happen."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection
from typing import TypeVar

from triton_distributed.runtime import Client

# Discovery through etcd forgets a killed worker after its lease of 10 s. All other waits are much shorter.
PATIENCE_S = 30.0

T = TypeVar("T")


async def patiently(awaitable: Awaitable[T]) -> T:
    """Return a result that must come.

    Raises:
        TimeoutError: it has not come within `PATIENCE_S`.
    """
    async with asyncio.timeout(PATIENCE_S):
        return await awaitable


async def until(true: Callable[[], object], what: str) -> None:
    """Wait until a condition is true that must become true.

    Raises:
        TimeoutError: the condition is not true within `PATIENCE_S`; the text names `what`.
    """
    end = time.monotonic() + PATIENCE_S
    while not true():
        if time.monotonic() > end:
            raise TimeoutError(f"not within {PATIENCE_S:g} s: {what}")
        await asyncio.sleep(0.005)


async def known(clients: Collection[Client], ids: list[int]) -> None:
    """Wait until each client knows exactly these instances."""
    wanted = sorted(ids)
    await until(lambda: all(sorted(each.instance_ids()) == wanted for each in clients), f"exactly {wanted} serve")
