"""Steps at fixed times for all streams of a process, and the gaps between them. Standard library only."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from array import array
from pathlib import Path

GAPS = "BENCH_LLM_GAPS"
"""The environment variable with the path of the file of the gaps; without it none are noted."""


class Gaps:
    """The times between the steps of this process, by the monotonic clock. A step gives each stream a token.

    Slow readers delay the streams that they read, but no step.
    """

    def __init__(self) -> None:
        self._path = os.environ.get(GAPS)
        self._noted = array("d")
        self._last = 0.0

    def note(self) -> None:
        """Note a step."""
        if self._path:
            now = time.monotonic()
            if self._last:
                self._noted.extend((now, now - self._last))
            self._last = now

    def write(self) -> None:
        """Write them to the file that the environment names."""
        if self._path:
            Path(self._path).write_bytes(self._noted.tobytes())

    def write_at_signal(self) -> None:
        """Write them at SIGTERM, which then ends this process."""

        def end() -> None:
            self.write()
            os._exit(0)

        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, end)


class Steps:
    """Ends every wait at the next of the due times, for all streams at once, as the batch of an engine does.

    Args:
        every_s: the time from one step to the next.
        gaps: where the steps are noted.
    """

    def __init__(self, every_s: float, gaps: Gaps) -> None:
        self._every_s, self._gaps = every_s, gaps
        self._waiting: list[asyncio.Future[None]] = []
        self._due = 0.0

    async def wait(self) -> None:
        """Wait for the next step."""
        loop = asyncio.get_running_loop()
        waiter = loop.create_future()
        if not self._waiting:
            self._due = max(self._due + self._every_s, loop.time())
            loop.call_at(self._due, self._step)
        self._waiting.append(waiter)
        await waiter

    def _step(self) -> None:
        self._gaps.note()
        waiting, self._waiting = self._waiting, []
        for each in waiting:
            if not each.done():
                each.set_result(None)


def read_gaps(path: Path, began: float, ended: float) -> list[float]:
    """Return the gaps of a file that ended within a time, seconds, in order.

    Args:
        path: the file that `Gaps.write` wrote.
        began: the begin of the time, by the monotonic clock.
        ended: its end.
    """
    read = array("d", path.read_bytes())
    return sorted(gap for at, gap in zip(read[::2], read[1::2], strict=True) if began <= at < ended)
