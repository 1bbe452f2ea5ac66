"""Which CPU cores each replica gets. `os.sched_setaffinity` exists on Linux only."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable, Iterator, Sequence

Cores = tuple[int, ...]


def allowed_cores() -> Cores:
    """The cores that this process may use, in order. They are fewer than the machine has under `taskset` or a cpuset.

    Raises:
        OSError: this system cannot bind processes to cores.
    """
    if sys.platform != "linux":
        raise OSError(f"{sys.platform} cannot bind processes to cores: replicas are pinned on Linux only")
    return tuple(sorted(os.sched_getaffinity(0)))


def shares(count: int, cores: Sequence[int]) -> list[Cores]:
    """Divide cores among processes: each gets neighbours, and their numbers differ by at most one.

    If there are fewer cores than processes, each process gets one core, and some share it.
    """
    if count > len(cores):
        return [(cores[index % len(cores)],) for index in range(count)]
    size = len(cores)
    return [tuple(cores[index * size // count : (index + 1) * size // count]) for index in range(count)]


def described(cores: Iterable[int]) -> str:
    """Cores as Linux writes them, for example `0-3,8`."""
    runs: list[list[int]] = []
    for core in cores:
        if runs and core == runs[-1][-1] + 1:
            runs[-1].append(core)
        else:
            runs.append([core])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


@contextlib.contextmanager
def bound(cores: Cores | None) -> Iterator[None]:
    """Bind this thread to cores for a while: a process that it starts meanwhile, with all its threads, stays bound.

    A process that were bound after its start could have started threads before.

    Raises:
        OSError: the system has taken all of these cores away.
    """
    if cores is None or sys.platform != "linux":
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # The cores of before were taken away meanwhile.
            os.sched_setaffinity(0, before)
