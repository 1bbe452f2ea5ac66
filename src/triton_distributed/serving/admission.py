"""Who waits for a place at an endpoint, in which order, and who is told at once that waiting is of no use."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from itertools import chain, islice
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from triton_distributed.serving.request import Serving

NEW_WEIGHT = 0.1  # of the newest handler in the running mean of how long they take: about the last 20 decide
ERROR_WEIGHT = 0.03  # of the newest error in what is known of them: a spread takes more of them than a mean does
MARGIN = 4.0  # mean deviations, as TCP keeps to its round trips (RFC 6298): 99.9 % of a normal distribution are below
MOST_MARGIN = 0.25  # of a request's time: where estimates are wrong by more, to try beats to refuse


class Errors:
    """How far estimates were off, seconds, late ones above 0: exponentially weighted mean and mean deviation."""

    __slots__ = ("_count", "_deviation", "_mean")

    def __init__(self) -> None:
        self._count = 0
        self._mean = self._deviation = 0.0

    def add(self, seconds: float) -> None:
        """One more estimate was off by that."""
        self._count += 1
        weight = max(ERROR_WEIGHT, 1.0 / self._count)
        self._mean += (seconds - self._mean) * weight
        self._deviation += (abs(seconds - self._mean) - self._deviation) * weight

    @property
    def margin_s(self) -> float:
        """What to add to an estimate so that nearly all keep to it."""
        return max(0.0, self._mean + MARGIN * self._deviation)


class Places:
    """The handlers that one worker may run at once, of all its endpoints together.

    A session may have no more than are left: one alone takes half of them, and n that take all they can leave one part
    of n + 1 to whoever comes next. (Choudhury and Hahne, "Dynamic queue length thresholds for shared-memory packet
    switches", 1998, with a factor of 1.)

    Attributes:
        most: how many.
        taken: how many run, or are about to.
    """

    __slots__ = ("most", "taken")

    def __init__(self, most: int) -> None:
        self.most = most
        self.taken = 0

    def refusal(self, streams: int) -> str:
        """Why a session with so many open streams, the newest included, gets no place for it."""
        return (
            f"{self.taken:,} of at most {self.most:,} requests run in this worker, "
            f"and {streams - 1:,} are of this session: see TRD_MAX_REQUESTS"
        )


class Admission:
    """The queue in front of an endpoint's handlers: by priority, then by arrival.

    Args:
        max_inflight: handlers that may run at once; None for as many as come, and then nobody ever waits.
        max_queue: requests that may wait.

    Attributes:
        mean_s: how long a handler takes, seconds: an exponentially weighted mean; 0 before the first has ended.
    """

    __slots__ = ("_errors", "_lines", "_waiting", "max_inflight", "max_queue", "mean_s")

    def __init__(self, max_inflight: int | None, max_queue: int) -> None:
        self.max_inflight = max_inflight
        self.max_queue = max_queue
        self.mean_s = 0.0
        self._lines: dict[int, deque[Serving]] = {}  # by priority; an empty line is removed
        self._waiting = 0
        self._errors: dict[int, Errors] = {}  # by priority, of which there are 256: the lower ones are overtaken

    def __len__(self) -> int:
        return self._waiting

    def took(self, seconds: float, whole: bool = True) -> None:
        """A handler has ended after this time; one that was cut short says only that they take no less."""
        if whole or seconds > self.mean_s:
            self.mean_s += (seconds - self.mean_s) * (NEW_WEIGHT if self.mean_s else 1.0)

    def ended(self, priority: int, late_s: float, whole: bool = True) -> None:
        """A request has ended so much later than was expected when it came; one that was cut short, no less late."""
        if whole or late_s > 0:
            self._errors.setdefault(priority, Errors()).add(late_s)

    def in_time(self, priority: int, timeout_s: float) -> bool:
        """Whether a request that came now and has so much time would be answered within it, if it has to wait."""
        errors = self._errors.get(priority)
        margin_s = 0.0 if errors is None else min(errors.margin_s, MOST_MARGIN * timeout_s)
        return self.wait_s(priority) + self.mean_s + margin_s <= timeout_s

    def wait_s(self, priority: int) -> float:
        """Seconds that a request of this priority would wait, if it came now: those before it, by the running mean.

        With n handlers at work a place comes free every mean / n seconds (Little's law, with all places taken).
        """
        if self.max_inflight is None:
            return 0.0
        return (self._ahead(priority) + 1) * self.mean_s / self.max_inflight

    def retry_after_s(self, priority: int, running: dict[Serving, None], now: float) -> float:
        """Seconds after which a request of this priority would have a place: what a refused one is told.

        `wait_s` knows only handlers that have ended. This looks at those that run as well: at the one with whose end
        the place comes free, which is the oldest for the next request, the second oldest for the one after it, and so
        on. Where even the youngest has run for longer than handlers took so far, they take longer now. How long is not
        known then, so each is expected to run twice as long as they have run on average, which is the expectation for
        something that is seen at a random moment.

        Args:
            running: the handlers that run, in the order in which they began.
            now: on the clock of `Serving.started`.

        Returns:
            0 where nothing has ended and those that run have only just begun.
        """
        if not running:
            return self.wait_s(priority)
        oldest_s, youngest_s = now - next(iter(running)).started, now - next(reversed(running)).started
        takes_s = self.mean_s if youngest_s <= self.mean_s else oldest_s + youngest_s
        rounds, position = divmod(self._ahead(priority), len(running))
        age_s = now - next(islice(running, position, None)).started
        return max(rounds * takes_s + max(0.0, takes_s - age_s), self.wait_s(priority))

    def _ahead(self, priority: int) -> int:
        """How many that wait are let in before a request of this priority that came now."""
        return sum(len(line) for each, line in self._lines.items() if each >= priority)

    def enter(self, serving: Serving, priority: int) -> Serving | None:
        """Let a request wait.

        Returns:
            the request that has no place now: None; `serving` itself; or one of lower priority, the last that came.
        """
        cut: Serving | None = None
        if self._waiting >= self.max_queue:
            lowest = min(self._lines, default=priority)
            if lowest >= priority or not self._waiting:
                return serving
            cut = self._lines[lowest].pop()
            self._left(lowest)
        self._lines.setdefault(priority, deque()).append(serving)
        self._waiting += 1
        return cut

    def leave(self, serving: Serving, priority: int) -> bool:
        """A request that waited was cancelled, or its time is over. False: it did not wait."""
        line = self._lines.get(priority)
        try:
            if line is None:
                return False
            line.remove(serving)
        except ValueError:
            return False
        self._left(priority)
        return True

    def next(self) -> Serving | None:
        """Who is let in now: the first of the highest priority."""
        if not self._waiting:
            return None
        highest = max(self._lines)
        serving = self._lines[highest].popleft()
        self._left(highest)
        return serving

    def waiting(self) -> Iterator[Serving]:
        """Those that wait, in no order."""
        return chain.from_iterable(self._lines.values())

    def clear(self) -> list[Serving]:
        """Send everybody away; returns them in order."""
        found = []
        while (serving := self.next()) is not None:
            found.append(serving)
        return found

    def _left(self, priority: int) -> None:
        self._waiting -= 1
        if not self._lines[priority]:
            del self._lines[priority]
