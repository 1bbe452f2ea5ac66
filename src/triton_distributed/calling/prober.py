"""Takes workers that cannot be reached out of every rotation, and puts them back after a successful probe."""

from __future__ import annotations

import asyncio
from contextvars import Context

from triton_distributed.calling.candidates import Candidates
from triton_distributed.errors import ConnectionFailed
from triton_distributed.transport.pool import Addresses, SessionPool


class Prober:
    """Takes lost workers out of every rotation, and puts them back.

    Args:
        loop: the running loop.

    Attributes:
        pool: the runtime's sessions, set before a session can be lost.
    """

    pool: SessionPool

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._endpoints: list[Candidates] = []  # One for each endpoint that this runtime calls.
        self._probes: dict[Addresses, asyncio.Task[None]] = {}  # At most one for each listed worker.
        self._closed = False

    def add(self, candidates: Candidates) -> None:
        """Keep the rotation of one more endpoint."""
        self._endpoints.append(candidates)

    def lost(self, addresses: Addresses, reason: str = "") -> None:
        """Note that the worker at these addresses was lost, is silent, or could not be reached."""
        due = self._mark_down(addresses)
        if due is None or addresses in self._probes or self._closed:
            return
        # A probe may last for long, and must not keep the context of a request.
        self._probes[addresses] = self._loop.create_task(self._probe(addresses, due), context=Context())

    def _mark_down(self, addresses: Addresses) -> float | None:
        due = [each for endpoint in self._endpoints if (each := endpoint.mark_down(addresses)) is not None]
        return max(due) if due else None

    async def _probe(self, addresses: Addresses, due: float | None) -> None:
        try:
            while due is not None:
                await asyncio.sleep(max(0.0, due - self._loop.time()))
                try:
                    await self.pool.probe(addresses)
                except ConnectionFailed:
                    due = self._mark_down(addresses)
                else:
                    for endpoint in self._endpoints:
                        endpoint.mark_up(addresses)
                    return
        finally:  # The probe ends in the turn of its success. Otherwise a loss in between would start no new one.
            self._probes.pop(addresses, None)

    async def close(self) -> None:
        """Stop probing."""
        self._closed = True
        tasks = list(self._probes.values())
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
