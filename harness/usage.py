"""The processor time and the peak memory that a measurement takes, over all processes that take part in it."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

LINUX = sys.platform == "linux"


def cpu_s(pid: int) -> float:
    """Return the user and system time of all threads of a process, seconds. Linux tells it in ns, others in 10 ms."""
    if LINUX:
        return time.clock_gettime((~pid << 3) | 2)  # The clock of a process, see clock_getcpuclockid(3).
    told = subprocess.run(["ps", "-o", "time=", "-p", str(pid)], capture_output=True, text=True, check=True).stdout
    hours, minutes, seconds = map(float, ("0:0:" + told.strip()).split(":")[-3:])
    return hours * 3600 + minutes * 60 + seconds


def descendants(pid: int) -> list[int]:
    """Return the processes that a process has started and that still run, with theirs. Only Linux tells them."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # The process has just ended.
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(stat.parent.name))
    found: list[int] = []
    new = children.get(pid, [])
    while new:
        found += new
        new = [child for each in new for child in children.get(each, ())]
    return found


def peak_mib(pids: Iterable[int]) -> float | None:
    """Return the sum of the peaks of the processes' resident memory, MiB; None if the system does not tell it.

    Pages that several processes share, such as those of libraries, count once for each process.
    """
    peaks = [found for pid in pids if (found := _peak_kib(pid)) is not None]
    return sum(peaks) / 1024 if peaks else None


class Usage:
    """What some processes use from here on. Processes that start later do not count.

    Args:
        pids: the processes.
    """

    def __init__(self, pids: Iterable[int]) -> None:
        self._before: dict[int, float] = {}
        for pid in pids:
            with contextlib.suppress(OSError, subprocess.CalledProcessError):
                _reset_peak(pid)
                self._before[pid] = cpu_s(pid)

    def cpu_s(self) -> float:
        """Return the processor time since the beginning, seconds, of the processes that still run."""
        used = 0.0
        for pid, before in self._before.items():
            with contextlib.suppress(OSError, subprocess.CalledProcessError):
                used += cpu_s(pid) - before
        return used

    def peak_mib(self) -> float | None:
        """Return `peak_mib` of the processes since the beginning, or since they started if peaks cannot be reset."""
        return peak_mib(self._before)


def _reset_peak(pid: int) -> None:
    with contextlib.suppress(OSError):
        Path(f"/proc/{pid}/clear_refs").write_text("5")  # See proc_pid_clear_refs(5).


def _peak_kib(pid: int) -> int | None:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1])
    return None
