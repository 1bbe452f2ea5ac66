"""What goes wrong, when and to whom: drawn from a seed, so that a schedule that finds something is run again."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from triton_distributed.errors import ConfigError


class FaultKind(StrEnum):
    """What can be done to a worker, its connections or the place where it is registered."""

    KILL = "kill"
    """The process ends without a word (SIGKILL) and another is started in its place."""
    STOP = "stop"
    """The process is paused (SIGSTOP) for `Fault.seconds` and goes on."""
    BLOCK = "block"
    """Its event loop is blocked for `Fault.seconds`."""
    CUT = "cut"
    """Its connections end; new ones are carried."""
    DELAY = "delay"
    """What its connections carry comes `Fault.seconds / 10` later, for `Fault.seconds`."""
    DUPLICATE = "duplicate"
    """Many connections are opened to it at once, and left or ended in the middle of a hello."""
    TRUNCATE = "truncate"
    """Its connections end after another `Fault.amount` bytes, in the middle of whatever that is."""
    CORRUPT = "corrupt"
    """The byte after another `Fault.amount` bytes arrives with its bits turned, on each of its connections."""
    DISK_FULL = "disk full"
    """The folder of discovery takes no more bytes for `Fault.seconds`."""
    NO_FDS = "no fds"
    """The process has no free file descriptor for `Fault.seconds`."""
    DRAIN = "drain"
    """The process is asked to end (SIGTERM) and another is started in its place."""


# Those that last; the others are over when they have happened, though the worker may take a while to be back.
LASTING = frozenset({FaultKind.STOP, FaultKind.BLOCK, FaultKind.DELAY, FaultKind.DISK_FULL, FaultKind.NO_FDS})


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that goes wrong.

    Attributes:
        at_s: seconds after the beginning of the schedule.
        kind: what is done.
        worker: to which worker, by its number from 0.
        seconds: how long it lasts; 0.0 for what is over at once.
        amount: bytes that a connection still carries before it is truncated or corrupted; else 0.
    """

    at_s: float
    kind: FaultKind
    worker: int
    seconds: float = 0.0
    amount: int = 0


@dataclass(frozen=True, slots=True)
class Recovery:
    """Seconds after a fault's end during which its worker counts as not well yet."""

    restart_s: float = 1.0
    """A killed or drained worker is served by its successor by then."""
    other_s: float = 0.3
    """Connections are dialled again by then."""


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
    """Draw a schedule: the same arguments give the same one, on every machine and Python.

    Args:
        seed: any int.
        duration_s: seconds during which faults begin.
        workers: how many there are.
        kinds: those to draw from, each equally likely.
        faults_per_s: faults that begin in a second on average; fewer where too few workers would be left well.
        longest_s: seconds of the longest lasting fault; each is between a tenth of that and all of it.
        spare: workers that are well at every moment, so that requests which may move can be answered.
        recovery: how long a worker is not well after its fault.

    Raises:
        ConfigError: a number makes no sense, e.g. no worker may be hurt.
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
    """When the worker of a fault counts as well again, seconds after the beginning."""
    restarts = fault.kind in (FaultKind.KILL, FaultKind.DRAIN)
    return fault.at_s + fault.seconds + (recovery.restart_s if restarts else recovery.other_s)


def _checked(
    kinds: Iterable[FaultKind], duration_s: float, workers: int, faults_per_s: float, longest_s: float, spare: int
) -> Sequence[FaultKind]:
    chosen = tuple(dict.fromkeys(FaultKind(each) for each in kinds))
    if not chosen:
        raise ConfigError("kinds", "", "at least one kind of fault")
    for name, value in (("duration_s", duration_s), ("faults_per_s", faults_per_s), ("longest_s", longest_s)):
        if not 0 < value < float("inf"):
            raise ConfigError(name, value, "a number above 0")
    if not 0 <= spare < workers:
        raise ConfigError("spare", spare, f"at least 0 and below the number of workers, {workers}: the others are hurt")
    return chosen
