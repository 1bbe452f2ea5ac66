"""A worker's place in a cluster: the process that holds it now, its successors, and the proxy in front of them."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from triton_distributed.testing.chaos.processes import WorkerEnded, WorkerProcess, last_words
from triton_distributed.testing.proxy import FaultProxy

# Seconds. A drain may take TRD_DRAIN_TIMEOUT_S, which a cluster sets to 10, and five more for clients that do not read.
DRAIN_S = 30.0


class Place:
    """One of a cluster's workers. All on one loop.

    Args:
        number: from 0.
        command: the program.
        settings: its variables.
        log: what all its processes print.
        proxy: in front of it, started; None for none.
        recovery_s: seconds after a fault that clients may need to find it well.
        accuse: takes the words for what must not happen.

    Attributes:
        process: the present one.
        may_start: not set while a successor could not register.
    """

    def __init__(
        self,
        number: int,
        command: Sequence[str],
        settings: Mapping[str, str],
        log: Path,
        proxy: FaultProxy | None,
        recovery_s: float,
        accuse: Callable[[str], None],
    ) -> None:
        self.number, self.log, self.proxy = number, log, proxy
        self._command, self._settings = command, settings
        self._recovery_s, self._accuse = recovery_s, accuse
        self._loop = asyncio.get_running_loop()
        self._well_from = float("inf")
        self._spans: list[list[float]] = []  # from when to when it was hurt; as many as the schedule has for it
        self._ending = False
        self.may_start = asyncio.Event()
        self.may_start.set()
        self.process = self._launch()

    def _launch(self) -> WorkerProcess:
        process = WorkerProcess(self._command, self._settings, self.log)
        process.ended.add_done_callback(lambda ended: self._ended(process, ended.result()))
        return process

    async def start(self) -> None:
        """Wait until it serves."""
        await self.process.started()
        self._well_from = self._loop.time() + self._recovery_s

    @property
    def well(self) -> bool:
        """Whether it serves, nothing is done to it, and clients had the time to see that."""
        return self._loop.time() >= self._well_from and not self.process.ended.done()

    def was_well(self, from_s: float, to_s: float) -> bool:
        """Whether it was, all the time between two moments of the monotonic clock. From any thread."""
        return not any(began <= to_s and from_s <= ended for began, ended in self._spans)

    def __enter__(self) -> Place:
        """A fault begins; there is one at a time."""
        self._well_from = float("inf")
        self._spans.append([self._loop.time(), self._well_from])
        return self

    def __exit__(self, *exception: object) -> None:
        self._spans[-1][1] = self._well_from = self._loop.time() + self._recovery_s

    async def kill(self) -> None:
        """SIGKILL, and a successor."""
        await self.process.end(signal.SIGKILL, DRAIN_S)
        await self._succeed()

    async def drain(self) -> None:
        """SIGTERM, and a successor once it has exited as promised."""
        await self._drain()
        await self._succeed()

    async def _drain(self) -> None:
        status = await self.process.end(signal.SIGTERM, DRAIN_S)
        if status is None:
            self._accuse(f"{self} did not exit within {DRAIN_S:g} s of SIGTERM: {last_words(self.log)}")
        elif status != 0:
            self._accuse(f"{self} exited with {status} after SIGTERM: {last_words(self.log)}")

    async def _succeed(self) -> None:
        self.process.close()
        await self.may_start.wait()
        if self._ending:
            return
        self.process = self._launch()
        try:
            await self.start()
        except WorkerEnded as error:
            self._accuse(f"{self} did not start: {error}: {last_words(self.log)}")

    def _ended(self, process: WorkerProcess, status: int) -> None:
        if not process.asked_to_end and not self._ending:
            self._accuse(f"{self} ended by itself with {status}: {last_words(self.log)}")

    def heal(self) -> None:
        """Take back what its proxy still does, and let it run."""
        if self.proxy is not None:
            self.proxy.up.delay_s = self.proxy.down.delay_s = 0.0
            if self.proxy.threatened:
                self.proxy.cut(reset=True)
            self.proxy.heal()
        self.process.send(signal.SIGCONT)

    async def finish(self) -> None:
        """SIGTERM, without a successor; says what it did not do well."""
        if not self.process.ended.done():
            await self._drain()
        self.close()

    def close(self) -> None:
        """Kill what still runs."""
        self._ending = True
        self.process.close()

    def __str__(self) -> str:
        return f"worker {self.number} (process {self.process.pid})"
