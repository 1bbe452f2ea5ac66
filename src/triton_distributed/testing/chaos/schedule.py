"""The schedule of faults: kind, time and worker. It is drawn from a seed, so that a run can be repeated."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from triton_distributed.errors import ConfigError


class FaultKind(StrEnum):
    """The kinds of faults of a worker, its connections or its discovery."""

    KILL = "kill"
    """The process is killed (SIGKILL), and another is started in its place."""
    STOP = "stop"
    """The process is paused (SIGSTOP) for `Fault.seconds` and then goes on."""
    BLOCK = "block"
    """The worker's event loop is blocked for `Fault.seconds`."""
    CUT = "cut"
    """The worker's connections end; new ones are forwarded."""
    DELAY = "delay"
    """Bytes on the worker's connections arrive `Fault.seconds / 10` later, for `Fault.seconds`."""
    DUPLICATE = "duplicate"
    """Many connections to the worker are opened at once, then left idle or ended in the middle of a hello."""
    TRUNCATE = "truncate"
    """The worker's connections end after another `Fault.amount` bytes, in the middle of any data."""
    CORRUPT = "corrupt"
    """On each of the worker's connections, the byte after `Fault.amount` more bytes arrives with its bits flipped."""
    DISK_FULL = "disk full"
    """The folder of discovery accepts no more bytes for `Fault.seconds`."""
    NO_FDS = "no fds"
    """The process has no free file descriptor for `Fault.seconds`."""
    DRAIN = "drain"
    """The process is asked to end (SIGTERM), and another is started in its place."""


# The faults that last. The others are over at once, though the worker may need a while to recover.
LASTING = frozenset({FaultKind.STOP, FaultKind.BLOCK, FaultKind.DELAY, FaultKind.DISK_FULL, FaultKind.NO_FDS})


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault of a schedule.

    Attributes:
        at_s: its time, in seconds after the beginning of the schedule.
        kind: the kind of the fault.
        worker: the number of the affected worker, from 0.
        seconds: its duration; 0.0 for a fault that is over at once.
        amount: bytes that a connection still carries before it is truncated or corrupted; 0 for other kinds.
    """

    at_s: float
    kind: FaultKind
    worker: int
    seconds: float = 0.0
    amount: int = 0


@dataclass(frozen=True, slots=True)
class Recovery:
    """Seconds after a fault's end during which its worker does not yet count as well."""

    restart_s: float = 1.0
    """Seconds until the successor of a killed or drained worker serves."""
    other_s: float = 0.3
    """Seconds until connections are dialled again after another fault."""


def schedule(
    seed: int,
    *,
    duration_s: float,
    workers: int,
    kinds: Iterable[FaultKind] = tuple(FaultKind),
    faults_per_s: float = 1.0,
    longest_s: float = 1.0,
    spare: int = 1,
    recovery: Recovery = Recovery(),
) -> tuple[Fault, ...]:
    """Draw a schedule. The same arguments give the same schedule on every machine and Python.

    Args:
        seed: any int.
        duration_s: seconds during which faults begin.
        workers: the number of workers.
        kinds: the kinds to draw from, each equally likely.
        faults_per_s: average number of faults that begin in a second; fewer if too few workers would be left well.
        longest_s: seconds of the longest lasting fault; each takes between a tenth of this and all of it.
        spare: workers that are well at every moment, so that requests that may move can be answered.
        recovery: seconds after a fault during which its worker does not count as well.

    Raises:
        ConfigError: a number is invalid, e.g. if no worker may have a fault.
    """
    chosen = _checked(kinds, duration_s, workers, faults_per_s, longest_s, spare)
    rng = random.Random(seed)
    well_from = [0.0] * workers
    faults: list[Fault] = []
    at = rng.expovariate(faults_per_s)
    while at < duration_s:
        well = [worker for worker in range(workers) if well_from[worker] <= at]
        if len(well) > spare:
            kind = chosen[int(rng.random() * len(chosen))]
            worker = well[int(rng.random() * len(well))]
            seconds = longest_s * (0.1 + 0.9 * rng.random()) if kind in LASTING else 0.0
            amount = int(2 ** (rng.random() * 16)) if kind in (FaultKind.TRUNCATE, FaultKind.CORRUPT) else 0
            faults.append(Fault(at, kind, worker, seconds, amount))
            well_from[worker] = well_again_s(faults[-1], recovery)
        at += rng.expovariate(faults_per_s)
    return tuple(faults)


def well_again_s(fault: Fault, recovery: Recovery) -> float:
    """The time at which the worker of a fault counts as well again, in seconds after the beginning."""
    restarts = fault.kind in (FaultKind.KILL, FaultKind.DRAIN)
    return fault.at_s + fault.seconds + (recovery.restart_s if restarts else recovery.other_s)


def _checked(
    kinds: Iterable[FaultKind], duration_s: float, workers: int, faults_per_s: float, longest_s: float, spare: int
) -> Sequence[FaultKind]:
    chosen = tuple(dict.fromkeys(FaultKind(each) for each in kinds))
    if not chosen:
        raise ConfigError("kinds", "", "must name at least one kind of fault")
    for name, value in (("duration_s", duration_s), ("faults_per_s", faults_per_s), ("longest_s", longest_s)):
        if not 0 < value < float("inf"):
            raise ConfigError(name, value, "must be a number above 0")
    if not 0 <= spare < workers:
        raise ConfigError("spare", spare, f"must be at least 0 and below the number of workers, {workers}")
    return chosen
