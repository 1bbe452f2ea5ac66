"""Counters of endpoints and clients: plain integers that one event loop writes and any thread may read."""

from __future__ import annotations

import threading
from enum import IntEnum
from typing import Final

from triton_distributed.observe.histogram import BOUNDS_S, Histogram, taken


class Outcome(IntEnum):
    """How a request ended."""

    OK = 0
    ERROR = 1  # the handler raised
    INVALID = 2  # the request did not fit the handler
    CANCELLED = 3  # the caller left
    DEADLINE = 4  # its deadline passed
    REFUSED = 5  # overloaded, draining or unknown here: no handler began
    LOST = 6  # the connection broke
    UNREACHABLE = 7  # calls only: no instance was found or reached
    CUT = 8  # requests only: a drain was over, or the endpoint was withdrawn, before the handler had ended


class OutlierStats:
    """Counts the ejections of an endpoint's outliers by the clients of one runtime.

    Attributes:
        ejections: number of ejections so far.
        out: number of instances that are ejected now.
    """

    __slots__ = ("ejections", "out")

    def __init__(self) -> None:
        self.ejections = self.out = 0

    def __repr__(self) -> str:
        return f"<OutlierStats ejections={self.ejections} out={self.out}>"


class Stats:
    """Counts the requests of one endpoint or the calls of one client.

    Attributes:
        inflight: requests under way.
        items: items sent by handlers that ended well.
        ended: number of ended requests, indexed by `Outcome`.
        lock: held while histograms are counted, which any thread may do.
    """

    __slots__ = ("ended", "inflight", "items", "lock")

    def __init__(self) -> None:
        self.inflight = self.items = 0
        self.ended = [0] * len(Outcome)
        self.lock = threading.Lock()

    def outcomes(self) -> dict[str, int]:
        """Return the number of ended requests by the outcome's name in lower case."""
        return {each.name.lower(): self.ended[each] for each in Outcome}

    def __repr__(self) -> str:
        counts = ", ".join(f"{name}={count}" for name, count in self.outcomes().items() if count)
        return f"<{type(self).__name__} inflight={self.inflight} {counts or 'nothing ended'}>"


SHORT_S: Final = 0.0005
"""A wait for the loop of at most this many seconds is counted as no wait. It is one of `BOUNDS_S`."""


class TimedStats(Stats):
    """Counts and times requests or calls.

    Attributes:
        whole: durations of answers that came at once: the time until the first item is the whole time.
        duration: from the start to the end.
        first_item: from the start to the first item, or to the end of an answer without items.
    """

    __slots__ = ("duration", "first_item", "whole")

    def __init__(self) -> None:
        super().__init__()
        self.whole: list[float] = []
        self.duration, self.first_item = Histogram(), Histogram()

    def count(self) -> None:
        """Count what is fresh in the histograms. Call it before they are read; any thread may do so."""
        with self.lock:
            self.count_fresh()

    def try_count(self) -> None:
        """Count as `count` does, unless that is under way: the collector may end a call in the middle of it."""
        if self.lock.acquire(blocking=False):
            try:
                self.count_fresh()
            finally:
                self.lock.release()

    def count_fresh(self) -> None:
        """Count what is fresh; the lock is held."""
        whole = taken(self.whole)
        self.duration.add(whole)
        self.first_item.add(whole)
        self.duration.count()
        self.first_item.count()


class RequestStats(TimedStats):
    """Counts and times the requests of one endpoint whose handlers began, from their arrival on.

    Attributes:
        queue_wait: from the arrival to the admission.
        loop_wait: from the admission to the handler's first step. Waits of at most `SHORT_S` are counted as 0 s, in the
            bucket of `SHORT_S`. If both waits together are as short, the one in the queue counts as none, too.
    """

    __slots__ = ("loop_wait", "queue_wait")

    def __init__(self) -> None:
        super().__init__()
        self.queue_wait, self.loop_wait = Histogram(), Histogram()

    def count_fresh(self) -> None:
        """Count what is fresh. Requests that did not wait are not kept: their number is what is missing."""
        super().count_fresh()
        ended = sum(self.duration.counts)
        for wait, bucket in ((self.queue_wait, 0), (self.loop_wait, BOUNDS_S.index(SHORT_S))):
            wait.count()
            # A wait that has come meanwhile is ahead of its duration. No bucket may fall because of that.
            wait.counts[bucket] += max(0, ended - sum(wait.counts))


class CallStats(TimedStats):
    """Counts and times the calls of one client. `first_item` ends with its arrival, as in `Timing`.

    Attributes:
        retries: further requests that were sent after a failed attempt.
        resumes: of these, those that were to continue a stream.
        hedges: second attempts beside the first one.
    """

    __slots__ = ("hedges", "resumes", "retries")

    def __init__(self) -> None:
        super().__init__()
        self.retries = self.resumes = self.hedges = 0
