"""The processor time of a thread, and the time it waited for a processor."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import NamedTuple


class Usage(NamedTuple):
    """Processor times in seconds, each counted from some point in the past.

    Attributes:
        process: processor time of the whole process.
        loop: processor time of the loop's thread; None if unknown.
        starved: time for which the loop's thread could have run and got no processor; 0 if unknown.
    """

    process: float
    loop: float | None = None
    starved: float = 0.0


def usage_of_this_thread() -> Callable[[], Usage]:
    """Return a function that reads the usage of the present thread; it may be called in any thread."""
    clock: int | None = None
    if hasattr(time, "pthread_getcpuclockid"):  # missing on macOS
        clock = time.pthread_getcpuclockid(threading.get_ident())
    path = f"/proc/self/task/{threading.get_native_id()}/schedstat"

    def usage() -> Usage:
        loop, starved = None, 0.0
        try:
            if clock is not None:
                loop = time.clock_gettime(clock)
            with open(path, "rb") as file:
                starved = int(file.read().split()[1]) / 1e9
        except (OSError, IndexError, ValueError):
            pass  # the thread has ended, or the kernel does not count
        return Usage(time.process_time(), loop, starved)

    return usage
