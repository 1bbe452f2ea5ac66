"""Processes that outlive the one that started them: servers of a child that was killed, for example."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

from harness.usage import descendants


class Leftovers:
    """The processes below a process. Only Linux tells them.

    Args:
        pid: the process; it is not one of them.
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._began: dict[int, str] = {}

    def look(self) -> None:
        """Note the processes that run now, while the one above them still runs."""
        self._began |= {each: _began(each) for each in descendants(self._pid)}

    def kill(self) -> list[int]:
        """Kill those that still run, and return their ids. An id that another process has by now is left alone."""
        left = [pid for pid, began in self._began.items() if began and _began(pid) == began]
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return left


def _began(pid: int) -> str:
    """When a process started, in ticks since the machine did; empty if it has ended. See proc_pid_stat(5)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]
