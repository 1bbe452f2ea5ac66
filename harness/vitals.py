"""Resources of a process: memory, descriptors, threads, tasks, objects, entries of the runtime's tables, log counts."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import linecache
import logging
import os
import resource
import sys
import threading
import time
import tracemalloc
import warnings
from collections import Counter, deque
from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary, WeakSet, WeakValueDictionary

PACKAGE = "triton_distributed"
CONTAINERS = (dict, set, list, tuple, deque, bytearray, WeakSet, WeakKeyDictionary, WeakValueDictionary)
FRAMES = 4  # The frames of a trace: enough to show the codec and its caller.
WATCH_S = 0.05  # Seconds between two looks at another process.
SHOWN = 40  # The largest number of growths in a report.
MOST_KINDS = 100  # The largest number of kinds of log records that are counted. The package has fewer.


def resident_bytes(pid: int | str = "self") -> int:
    """Return the resident memory of a process, bytes; without /proc, the peak of this process."""
    try:
        with open(f"/proc/{pid}/statm") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except FileNotFoundError:
        return peak_resident_bytes()


def cpu_s(pid: int) -> float:
    """Return the processor time of a process, seconds."""
    with open(f"/proc/{pid}/stat") as stat:
        fields = stat.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def peak_resident_bytes() -> int:
    """Return the peak of this process's resident memory, bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def open_descriptors() -> int:
    """Return the number of file descriptors that this process has open."""
    return len(os.listdir("/proc/self/fd" if os.path.isdir("/proc/self/fd") else "/dev/fd"))


class _Mallinfo(ctypes.Structure):
    """`struct mallinfo2`, see mallinfo(3)."""

    NAMES = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    _fields_ = tuple((name, ctypes.c_size_t) for name in NAMES)


def allocated_bytes() -> int | None:
    """Return the bytes allocated with malloc and not freed; None if the C library does not report them.

    Python's own small objects are not included. `sys.getallocatedblocks()` counts those.
    """
    try:
        mallinfo = ctypes.CDLL(None).mallinfo2  # Glibc has this from 2.33 on.
    except AttributeError:
        return None
    mallinfo.restype = _Mallinfo
    found = mallinfo()
    return int(found.uordblks + found.hblkhd)


def sample() -> dict[str, int]:
    """Return the figures that cost little: bytes and counts."""
    return {
        "rss": resident_bytes(),
        "descriptors": open_descriptors(),
        "threads": threading.active_count(),
        "tasks": len(asyncio.all_tasks()),
    }


class Inventory:
    """The objects of an idle process, and their growth since `baseline`.

    Args:
        trace: trace allocations from the first baseline on, which makes everything several times slower.
    """

    def __init__(self, trace: bool) -> None:
        self._trace = trace
        self._looked = False
        self._most: tuple[Counter[str], Counter[str]] | None = None
        self._snapshot: tracemalloc.Snapshot | None = None

    def look(self) -> dict[str, int]:
        """Return `sample` after a garbage collection, with the blocks of Python and the bytes of malloc."""
        if not self._looked:
            count()  # Fills the interpreter's caches, so that counting itself is no growth.
            self._looked = True
        linecache.clearcache()  # It holds the source lines of tracebacks.
        gc.collect()
        blocks, allocated = sys.getallocatedblocks(), allocated_bytes()
        return {**sample(), "objects": len(gc.get_objects()), "blocks": blocks, "allocated": allocated or 0}

    def baseline(self) -> None:
        """Take the present state as a baseline. `growths` compares with the largest count at any baseline."""
        gc.collect()
        types, kept = count()
        self._most = (types, kept) if self._most is None else (self._most[0] | types, self._most[1] | kept)
        if self._trace:
            if not tracemalloc.is_tracing():  # Not earlier: under a trace, importing takes many seconds.
                tracemalloc.start(FRAMES)
            self._snapshot = tracemalloc.take_snapshot()

    def growths(self) -> dict[str, Any]:
        """Return the growths since all baselines, largest first: objects by type, entries of the runtime's tables."""
        gc.collect()
        if self._most is None:
            return {"types": {}, "kept": {}, "traced": []}
        types, kept = count()
        return {
            "types": dict((types - self._most[0]).most_common(SHOWN)),
            "kept": dict((kept - self._most[1]).most_common(SHOWN)),
            "traced": self._traced(),
        }

    def _traced(self) -> list[str]:
        if self._snapshot is None:
            return []
        ignored = (tracemalloc.Filter(False, tracemalloc.__file__), tracemalloc.Filter(False, __file__))
        now, then = (each.filter_traces(ignored) for each in (tracemalloc.take_snapshot(), self._snapshot))
        found = sorted(now.compare_to(then, "traceback"), key=lambda each: -each.size_diff)
        return [
            f"{each.size_diff:+,} bytes in {each.count_diff:+,} blocks\n" + "\n".join(each.traceback.format())
            for each in found[:SHOWN]
        ]


def count() -> tuple[Counter[str], Counter[str]]:
    """Count the collector's objects by type, and the entries that the package's objects hold by `Class.attribute`."""
    types: Counter[str] = Counter()
    kept: Counter[str] = Counter()
    for each in gc.get_objects():
        kind = type(each)
        module: Any = kind.__module__  # It is a property of some classes.
        types[f"{module}.{kind.__qualname__}"] += 1
        if isinstance(module, str) and module.startswith(PACKAGE):
            for name, value in _attributes(each):
                if isinstance(value, CONTAINERS):
                    kept[f"{kind.__qualname__}.{name}"] += len(value)
    return types, kept


def _attributes(thing: object) -> Iterator[tuple[str, Any]]:
    yield from getattr(thing, "__dict__", {}).copy().items()
    for kind in type(thing).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            name = f"_{kind.__name__.lstrip('_')}{name}" if name.startswith("__") and not name.endswith("__") else name
            try:
                yield name, object.__getattribute__(thing, name)
            except AttributeError:
                pass  # The attribute is not set, or it is `__dict__` or `__weakref__`.


class LogCounter(logging.Handler):
    """Counts log records and warnings by kind.

    Attributes:
        counts: warnings and errors by logger and text, without the values in the text.
        faults: records that must not occur: errors that asyncio could not raise anywhere, and Python's warnings.
    """

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.counts: Counter[str] = Counter()
        self.faults: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        kind = f"{record.name}: {record.msg}"
        if len(self.counts) < MOST_KINDS or kind in self.counts:
            self.counts[kind] += 1
        unraised = record.name == "asyncio" and record.levelno >= logging.ERROR
        if (unraised or record.name == "py.warnings") and len(self.faults) < SHOWN:
            self.faults.append(logging.Formatter("%(name)s: %(message)s").format(record))

    def listen(self) -> None:
        """Take all log records of this process, in place of its stderr."""
        logging.basicConfig(handlers=[self], level=logging.WARNING)
        logging.captureWarnings(True)
        if not sys.warnoptions:
            warnings.simplefilter("default")


class Watch:
    """Observes another process during the `async with`.

    Attributes:
        peak: its largest resident memory, bytes.
        cpu: the share of one processor that it used.
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self.peak, self.cpu = 0, 0.0

    async def __aenter__(self) -> Watch:
        self._began = (time.perf_counter(), cpu_s(self._pid))
        self._task = asyncio.ensure_future(self._look())
        return self

    async def _look(self) -> None:
        while True:
            self.peak = max(self.peak, resident_bytes(self._pid))
            await asyncio.sleep(WATCH_S)

    async def __aexit__(self, *exception: object) -> None:
        self._task.cancel()
        self.peak = max(self.peak, resident_bytes(self._pid))
        began, used = self._began
        self.cpu = (cpu_s(self._pid) - used) / (time.perf_counter() - began)
