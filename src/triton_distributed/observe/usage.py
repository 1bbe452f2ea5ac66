"""What a thread has had of the processor, and for how long it waited for one."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import NamedTuple


class Usage(NamedTuple):
    """Seconds, each counted from some moment in the past.

    Attributes:
        process: of processor time that the whole process has used.
        loop: of those, what the loop's thread has used; None where the system does not tell.
        starved: for which the loop's thread could have run and got no processor; 0 where the system does not tell.
    """

    process: float
    loop: float | None = None
    starved: float = 0.0


def usage_of_this_thread() -> Callable[[], Usage]:
    """A function that reads the usage of the thread that calls this one; it may be called in any thread."""
    clock: int | None = None
    if hasattr(time, "pthread_getcpuclockid"):  # macOS has none
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
            pass  # the thread has ended, or the kernel counts nothing
        return Usage(time.process_time(), loop, starved)

    return usage
