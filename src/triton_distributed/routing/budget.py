"""The budget for retries of a client: enough for a worker's death, too few to multiply an outage."""

from __future__ import annotations

RATIO = 0.2  # retries per call: if every call fails, load grows by a fifth at most (also Finagle's default)
PER_SECOND = 10.0  # further retries per second, so that a client with few calls may retry at all
LEAST = 100.0  # retries that may always be saved up: one worker's death in a fleet costs this many calls at once


class RetryBudget:
    """A bucket that calls fill and retries empty. It is updated only when a call is to be retried.

    Args:
        now: seconds on any monotonic clock.
    """

    __slots__ = ("_balance", "_calls", "_seen")

    def __init__(self, now: float) -> None:
        self._balance = LEAST
        self._calls = 0
        self._seen = now

    def take(self, now: float, calls: int, inflight: int) -> bool:
        """Take one retry from the budget; returns whether it may be sent.

        Args:
            now: seconds on the constructor's clock.
            calls: number of calls so far, without retries.
            inflight: number of calls under way: a lost connection may end all of them at once, so as many retries may
                be saved up.
        """
        saved = self._balance + RATIO * (calls - self._calls) + PER_SECOND * (now - self._seen)
        self._calls, self._seen = calls, now
        self._balance = min(saved, max(LEAST, inflight))
        if self._balance < 1:
            return False
        self._balance -= 1
        return True
