"""A worker's place in a cluster: its present process, the process's successors, and the proxy in front of them."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from triton_distributed.testing.chaos.processes import WorkerEnded, WorkerProcess, last_words
from triton_distributed.testing.proxy import FaultProxy

# Seconds for a drain. It may take TRD_DRAIN_TIMEOUT_S, which a cluster sets to 10, plus 5 s if clients do not read.
DRAIN_S = 30.0


class Place:
    """One worker of a cluster. All calls are made on one loop, unless stated otherwise.

    Args:
        number: the worker's number, from 0.
        command: the program and its arguments.
        settings: its variables.
        log: the file for the output of all its processes.
        proxy: the started proxy in front of it; None for none.
        recovery_s: seconds after a fault until clients must find it well.
        accuse: takes the description of a violation.

    Attributes:
        process: the present process.
        may_start: cleared while a successor could not register.
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
        self._spans: list[list[float]] = []  # Beginning and end of each fault; the schedule bounds their number.
        self._ending = False
        self.may_start = asyncio.Event()
        self.may_start.set()
        self.process = self._launch()

    def _launch(self) -> WorkerProcess:
        process = WorkerProcess(self._command, self._settings, self.log)
        process.ended.add_done_callback(lambda ended: self._ended(process, ended.result()))
        return process

    async def start(self) -> None:
        """Wait until the worker serves."""
        await self.process.started()
        self._well_from = self._loop.time() + self._recovery_s

    @property
    def well(self) -> bool:
        """Whether the worker serves without a fault, and clients had time to notice it."""
        return self._loop.time() >= self._well_from and not self.process.ended.done()

    def was_well(self, from_s: float, to_s: float) -> bool:
        """Whether the worker was well between two moments of the monotonic clock. May be called from any thread."""
        return not any(began <= to_s and from_s <= ended for began, ended in self._spans)

    def __enter__(self) -> Place:
        """Begin a fault. A worker has one fault at a time."""
        self._well_from = float("inf")
        self._spans.append([self._loop.time(), self._well_from])
        return self

    def __exit__(self, *exception: object) -> None:
        self._spans[-1][1] = self._well_from = self._loop.time() + self._recovery_s

    async def kill(self) -> None:
        """Kill the process with SIGKILL and start a successor."""
        await self.process.end(signal.SIGKILL, DRAIN_S)
        await self._succeed()

    async def drain(self) -> None:
        """Drain the process with SIGTERM, check its exit, and start a successor."""
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
        """End the faults of the proxy, and continue the process if it is stopped."""
        if self.proxy is not None:
            self.proxy.up.delay_s = self.proxy.down.delay_s = 0.0
            if self.proxy.threatened:
                self.proxy.cut(reset=True)
            self.proxy.heal()
        self.process.send(signal.SIGCONT)

    async def finish(self) -> None:
        """Drain the process without a successor, and report violations."""
        if not self.process.ended.done():
            await self._drain()
        self.close()

    def close(self) -> None:
        """Kill the process if it still runs."""
        self._ending = True
        self.process.close()

    def __str__(self) -> str:
        return f"worker {self.number} (process {self.process.pid})"
