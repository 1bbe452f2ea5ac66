"""How much memory a process has."""

from __future__ import annotations

import os
import resource
import sys


def resident_bytes() -> int:
    """Resident memory of this process now, bytes; where there is no /proc, its peak so far."""
    try:
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except FileNotFoundError:
        return peak_resident_bytes()


def peak_resident_bytes() -> int:
    """The most resident memory that this process had at any time, bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def open_descriptors() -> int:
    """How many file descriptors this process has open."""
    return len(os.listdir("/proc/self/fd" if os.path.isdir("/proc/self/fd") else "/dev/fd"))
