"""The queue in front of an endpoint: its order, and estimates of how long a request would wait and take."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from itertools import chain, islice
from typing import Generic, Protocol, TypeVar

NEW_WEIGHT = 0.1
"""The weight of the newest handler in the running mean of how long handlers take: about the last 20 decide."""

ERROR_WEIGHT = 0.03
"""The weight of the newest estimate's error. It is below `NEW_WEIGHT`: a spread needs more samples than a mean."""

MARGIN = 4.0
"""Mean deviations added to an estimate, as TCP does for round trips (RFC 6298): 99.9 % of a normal distribution."""

MOST_MARGIN = 0.25
"""The largest margin, as a part of a request's timeout. If estimates are worse, trying is better than refusing."""


class Started(Protocol):
    """A request that may wait in an `Admission`: its handler began at `started`, on the loop's clock."""

    started: float


T = TypeVar("T", bound=Started)


class EstimateError:
    """The error of estimates in seconds: its weighted mean and mean deviation. It is positive for late requests."""

    __slots__ = ("_count", "_deviation", "_mean")

    def __init__(self) -> None:
        self._count = 0
        self._mean = self._deviation = 0.0

    def add(self, seconds: float) -> None:
        """Count the error of one more estimate."""
        self._count += 1
        weight = max(ERROR_WEIGHT, 1.0 / self._count)
        self._mean += (seconds - self._mean) * weight
        self._deviation += (abs(seconds - self._mean) - self._deviation) * weight

    @property
    def margin_s(self) -> float:
        """Seconds to add to an estimate so that nearly all requests end in time."""
        return max(0.0, self._mean + MARGIN * self._deviation)


class HandlerSlots:
    """The handlers that one worker may run at once, for all its endpoints together.

    A session may have no more streams than there are free slots. Its own streams take slots too. So one session can
    take at most half of the slots, and n greedy sessions leave 1/(n + 1) of them to the next session. (Choudhury and
    Hahne, "Dynamic queue length thresholds for shared-memory packet switches", 1998, with a factor of 1.)

    Attributes:
        most: the number of slots.
        taken: handlers that run or are about to run.
    """

    __slots__ = ("most", "taken")

    def __init__(self, most: int) -> None:
        self.most = most
        self.taken = 0

    def refusal(self, streams: int) -> str:
        """Return why a session gets no slot for its newest stream.

        Args:
            streams: open streams of the session, the newest included.
        """
        return (
            f"{self.taken:,} of at most {self.most:,} requests run in this worker, "
            f"and {streams - 1:,} are of this session: see TRD_MAX_REQUESTS"
        )


class Admission(Generic[T]):
    """The queue in front of an endpoint's handlers: by priority, then by arrival.

    Args:
        max_inflight: handlers that may run at once; None for no limit, and then no request waits.
        max_queue: requests that may wait.

    Attributes:
        mean_s: seconds that a handler takes: an exponentially weighted mean; 0 before the first handler has ended.
    """

    __slots__ = ("_errors", "_lines", "_waiting", "max_inflight", "max_queue", "mean_s")

    def __init__(self, max_inflight: int | None, max_queue: int) -> None:
        self.max_inflight = max_inflight
        self.max_queue = max_queue
        self.mean_s = 0.0
        self._lines: dict[int, deque[T]] = {}  # Waiting requests by priority. An empty line is removed.
        self._waiting = 0
        # One for each priority (at most 256). Requests of high priority overtake others, so the estimates of each
        # priority err differently.
        self._errors: dict[int, EstimateError] = {}

    def __len__(self) -> int:
        return self._waiting

    def took(self, seconds: float, whole: bool = True) -> None:
        """Count a handler that has ended.

        Args:
            seconds: how long the handler took.
            whole: False if the handler was cut short: then its time is only a lower bound.
        """
        if whole or seconds > self.mean_s:
            self.mean_s += (seconds - self.mean_s) * (NEW_WEIGHT if self.mean_s else 1.0)

    def ended(self, priority: int, late_s: float, whole: bool = True) -> None:
        """Count by how much the estimate of a request was wrong.

        Args:
            priority: the request's priority.
            late_s: seconds between the expected and the real end.
            whole: False if the request was cut short: then `late_s` is only a lower bound.
        """
        if whole or late_s > 0:
            self._errors.setdefault(priority, EstimateError()).add(late_s)

    def in_time(self, priority: int, timeout_s: float) -> bool:
        """Whether a request that came now and had to wait would be answered within `timeout_s` seconds."""
        errors = self._errors.get(priority)
        margin_s = 0.0 if errors is None else min(errors.margin_s, MOST_MARGIN * timeout_s)
        return self.wait_s(priority) + self.mean_s + margin_s <= timeout_s

    def wait_s(self, priority: int) -> float:
        """Seconds that a request of this priority would wait if it came now.

        With n running handlers, a place becomes free every mean / n seconds (Little's law, with all places taken).
        """
        if self.max_inflight is None:
            return 0.0
        return (self._ahead(priority) + 1) * self.mean_s / self.max_inflight

    def retry_after_s(self, priority: int, running: dict[T, None], now: float) -> float:
        """Seconds after which a request of this priority would have a place: the hint in a refusal.

        `wait_s` knows only handlers that have ended. This estimate looks at running handlers as well. The next request
        gets the place of the oldest handler, the request after it the place of the second oldest, and so on. If even
        the youngest handler has run for longer than the mean, handlers take longer now, by an unknown time. Then each
        handler is expected to take twice the average time that the running ones have run so far. Seen at a random
        moment, a handler is on average halfway through.

        Args:
            running: the running requests, in the order in which they began.
            now: the time on the clock of `started`.

        Returns:
            0 if no handler has ended and the running ones have only just begun.
        """
        if not running:
            return self.wait_s(priority)
        oldest_s, youngest_s = now - next(iter(running)).started, now - next(reversed(running)).started
        takes_s = self.mean_s if youngest_s <= self.mean_s else oldest_s + youngest_s
        rounds, position = divmod(self._ahead(priority), len(running))
        age_s = now - next(islice(running, position, None)).started
        return max(rounds * takes_s + max(0.0, takes_s - age_s), self.wait_s(priority))

    def _ahead(self, priority: int) -> int:
        """The number of waiting requests that are ahead of a new request of this priority."""
        return sum(len(line) for each, line in self._lines.items() if each >= priority)

    def enter(self, request: T, priority: int) -> T | None:
        """Add a request to the queue.

        Returns:
            the request that has no place in the queue: none, `request` itself, or the last one of the lowest priority.
        """
        evicted: T | None = None
        if self._waiting >= self.max_queue:
            lowest = min(self._lines, default=priority)
            if lowest >= priority or not self._waiting:
                return request
            evicted = self._lines[lowest].pop()
            self._left(lowest)
        self._lines.setdefault(priority, deque()).append(request)
        self._waiting += 1
        return evicted

    def leave(self, request: T, priority: int) -> bool:
        """Remove a request that was cancelled or has expired. False if it did not wait."""
        line = self._lines.get(priority)
        try:
            if line is None:
                return False
            line.remove(request)
        except ValueError:
            return False
        self._left(priority)
        return True

    def next(self) -> T | None:
        """Remove and return the request to admit now: the first of the highest priority."""
        if not self._waiting:
            return None
        highest = max(self._lines)
        request = self._lines[highest].popleft()
        self._left(highest)
        return request

    def waiting(self) -> Iterator[T]:
        """The waiting requests, in no particular order."""
        return chain.from_iterable(self._lines.values())

    def clear(self) -> list[T]:
        """Remove all waiting requests and return them in order."""
        found = []
        while (request := self.next()) is not None:
            found.append(request)
        return found

    def _left(self, priority: int) -> None:
        self._waiting -= 1
        if not self._lines[priority]:
            del self._lines[priority]
