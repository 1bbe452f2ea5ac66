"""One attack: what the worker and the other client say before, meanwhile and afterwards."""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.processes import Child

MIB = 1 << 20
SAMPLE_S = 0.05
SETTLE_S = 20.0  # what connections, handlers and timers of an attack have to be gone; a hello's timeout is 5 s
TICKS = os.sysconf("SC_CLK_TCK")
PAGE = os.sysconf("SC_PAGE_SIZE")


def resident(pid: int) -> int:
    """Resident memory of another process, bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE


def cpu_s(pid: int) -> float:
    """Processor time of another process, seconds."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


@dataclass
class Watch:
    """Looks at a process while something happens."""

    pid: int
    peak: int = 0
    cpu: float = 0.0
    _started: tuple[float, float] = field(default=(0.0, 0.0))

    async def __aenter__(self) -> Watch:
        self._started = (time.perf_counter(), cpu_s(self.pid))
        self._task = asyncio.ensure_future(self._look())
        return self

    async def _look(self) -> None:
        while True:
            self.peak = max(self.peak, resident(self.pid))
            await asyncio.sleep(SAMPLE_S)

    async def __aexit__(self, *exception: object) -> None:
        self._task.cancel()
        self.peak = max(self.peak, resident(self.pid))
        passed = time.perf_counter() - self._started[0]
        self.cpu = (cpu_s(self.pid) - self._started[1]) / passed


async def settled(child: Child, before: dict[str, Any]) -> dict[str, Any]:
    """What a child says of itself once it is as before, or when `SETTLE_S` are over."""
    end = time.monotonic() + SETTLE_S
    while True:
        state: dict[str, Any] = await child.ask("state")
        if (state["fds"] <= before["fds"] and state["tasks"] <= before["tasks"]) or time.monotonic() > end:
            return state
        await asyncio.sleep(0.25)


async def attacked(
    victim: Child, client: Child, attack: Any, seconds: float, rate: float, before: dict[str, Any], **more: Any
) -> dict[str, Any]:
    """The figures of one attack.

    Args:
        victim: the process whose memory and CPU count.
        client: the one whose calls do.
        attack: called when the load has begun; awaited for the attacker's own counts.
        before: the victim's state before it.
        more: what else the client is told of its load.
    """
    async with Watch(victim.process.pid) as watch:
        started = time.perf_counter()
        load, counts = await asyncio.gather(client.ask("load", seconds=seconds, rate=rate, **more), attack())
        passed = time.perf_counter() - started
    after = await settled(victim, before)
    return {
        "attacker": counts,
        "seconds": passed,
        "rss_before": before["rss"],
        "rss_peak": watch.peak,
        "rss_after": after["rss"],
        "cpu": watch.cpu,
        "fds": [before["fds"], after["fds"]],
        "tasks": [before["tasks"], after["tasks"]],
        "log_lines": after.get("log_lines", 0) - before.get("log_lines", 0),
        "load": load,
    }
