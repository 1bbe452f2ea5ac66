"""The processes of one run: workers that are killed, drained and replaced, and the clients that call them."""

from __future__ import annotations

import asyncio
import signal
import time
from collections import Counter
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks.processes import BenchmarkError, Child

WORKERS, CLIENTS = 3, 2
DRAIN_S = 30.0  # that a worker has for its end: TRD_DRAIN_TIMEOUT_S


class Fleet:
    """Workers and clients in a folder of their own.

    Args:
        folder: empty; it gets the journal and, with file discovery, the records.
        environ: settings of every process.
        limits: of the endpoint `limited`: seconds of its handler, max_inflight, max_queue.
        workers: how many there are.
        clients: how many client processes.
    """

    def __init__(
        self,
        folder: Path,
        environ: dict[str, str],
        limits: tuple[float, int, int] = (0.02, 8, 64),
        workers: int = WORKERS,
        clients: int = CLIENTS,
    ) -> None:
        self._journal = folder / "begun"
        self._environ = {"TRD_DIR": str(folder), **environ}
        self._limits = [str(each) for each in limits]
        self._counts = (workers, clients)
        self.workers: list[Child] = []
        self.clients: list[Child] = []

    async def __aenter__(self) -> Fleet:
        workers, clients = self._counts
        try:
            for _ in range(workers):
                self.workers.append(await self._worker())
            for number in range(clients):
                child = await Child.start("benchmarks.survival.client", f"c{number}", environ=self._environ)
                self.clients.append(child)
            await self.everybody("connect", workers=workers)
        except BaseException:
            await self.__aexit__(None, None, None)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.gather(*(each.stop() for each in self.clients))
        await asyncio.gather(*(each.stop() for each in self.workers))

    async def _worker(self) -> Child:
        return await Child.start("benchmarks.survival.worker", str(self._journal), *self._limits, environ=self._environ)

    async def everybody(self, question: str, **arguments: Any) -> list[Any]:
        """The answers of all clients."""
        return await asyncio.gather(*(each.ask(question, **arguments) for each in self.clients))

    async def kill(self, number: int) -> float:
        """`kill -9` a worker; returns when, on the clock that all processes share."""
        child = self.workers[number]
        at = time.monotonic()
        child.process.send_signal(signal.SIGKILL)
        await child.stop()
        return at

    async def replace(self, number: int) -> None:
        """Start a worker in the place of one that has ended; it is registered when this returns."""
        self.workers[number] = await self._worker()

    async def restart(self, number: int) -> tuple[float, int]:
        """SIGTERM a worker and start its successor at once; returns when, and the exit status of the old one."""
        old = self.workers[number]
        at = time.monotonic()
        old.process.send_signal(signal.SIGTERM)
        await self.replace(number)
        try:
            status = await asyncio.wait_for(old.process.wait(), DRAIN_S)
        except TimeoutError:
            raise BenchmarkError(f"a worker had not ended {DRAIN_S:g} s after SIGTERM") from None
        finally:
            await old.stop()
        return at, status

    def begun(self) -> Counter[str]:
        """How often a handler began for each request."""
        if not self._journal.exists():
            return Counter()
        return Counter(self._journal.read_text(encoding="ascii").split())
