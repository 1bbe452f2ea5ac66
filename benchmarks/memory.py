"""How much memory a process has."""

from __future__ import annotations

import ctypes
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


class _Mallinfo(ctypes.Structure):
    """`struct mallinfo2`, see mallinfo(3)."""

    NAMES = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    _fields_ = tuple((name, ctypes.c_size_t) for name in NAMES)


def allocated_bytes() -> int | None:
    """Bytes that this process has from malloc and has not given back; None where the C library does not tell.

    Python's own small objects are not in it: those are `sys.getallocatedblocks()`.
    """
    try:
        mallinfo = ctypes.CDLL(None).mallinfo2  # of glibc, from 2.33 on
    except AttributeError:
        return None
    mallinfo.restype = _Mallinfo
    found = mallinfo()
    return int(found.uordblks + found.hblkhd)
