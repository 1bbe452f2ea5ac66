"""Waiting for what must happen."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection
from typing import TypeVar

from triton_distributed.runtime import Client

# Discovery through etcd forgets a killed worker after its lease of 10 s; nothing else takes a tenth of this.
PATIENCE_S = 30.0

T = TypeVar("T")


async def patiently(awaitable: Awaitable[T]) -> T:
    """Return what must come.

    Raises:
        TimeoutError: it has not come within `PATIENCE_S`.
    """
    async with asyncio.timeout(PATIENCE_S):
        return await awaitable


async def until(true: Callable[[], object], what: str) -> None:
    """Wait until a condition that must become true is true.

    Raises:
        TimeoutError: it is not within `PATIENCE_S`; says `what` was waited for.
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
