"""Wakes the tasks of a supervisor after each change, so that they look at the state anew."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable


class Bell:
    """Tasks wait until a condition on shared state is true; whatever changes the state rings."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._waiting: set[asyncio.Future[None]] = set()

    def ring(self) -> None:
        """Let all waiting tasks test their conditions."""
        for each in self._waiting:
            if not each.done():
                each.set_result(None)

    async def until(self, condition: Callable[[], object], timeout_s: float | None = None) -> None:
        """Wait until a condition is true, or the time is over.

        Args:
            timeout_s: the longest time, seconds; None for no limit.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while not condition():
                    change = self._loop.create_future()
                    self._waiting.add(change)
                    try:
                        await change
                    finally:
                        self._waiting.discard(change)
