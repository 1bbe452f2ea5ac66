"""Workers that cannot be reached leave every rotation at once, and come back when a probe finds them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from triton_distributed.calling.candidates import EndpointView
from triton_distributed.errors import ConnectionFailed
from triton_distributed.transport.pool import Addresses, SessionPool


class Prober:
    """Marks lost workers down in every view, and up again.

    Args:
        loop: the running loop.
        views: the endpoint views of the runtime, as they are at any time.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, views: Iterable[EndpointView]) -> None:
        self._loop = loop
        self._views = views
        self._probes: dict[Addresses, asyncio.Task[None]] = {}  # at most one a worker that is listed
        self._closed = False

    def lost(self, addresses: Addresses, pool: SessionPool) -> None:
        """The worker at these addresses was lost or could not be reached."""
        due = self._mark_down(addresses)
        if due is None or addresses in self._probes or self._closed:
            return
        self._probes[addresses] = self._loop.create_task(self._probe(addresses, due, pool))

    def _mark_down(self, addresses: Addresses) -> float | None:
        due = [each for view in self._views if (each := view.mark_down(addresses)) is not None]
        return max(due) if due else None

    async def _probe(self, addresses: Addresses, due: float | None, pool: SessionPool) -> None:
        try:
            while due is not None:
                await asyncio.sleep(max(0.0, due - self._loop.time()))
                try:
                    await pool.probe(addresses)
                except ConnectionFailed:
                    due = self._mark_down(addresses)
                else:
                    for view in self._views:
                        view.mark_up(addresses)
                    return
        finally:  # in the same step as the success: from now on a loss starts another probe
            self._probes.pop(addresses, None)

    async def close(self) -> None:
        """Stop probing."""
        self._closed = True
        tasks = list(self._probes.values())
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
