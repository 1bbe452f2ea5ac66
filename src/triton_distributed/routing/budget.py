"""How many calls a client may send a second time: enough for a worker's death, too few to multiply an outage."""

from __future__ import annotations

RATIO = 0.2  # of the calls: with every call failing, load grows by a fifth and no more (Finagle's default too)
PER_SECOND = 10.0  # beside that, so that a client with few calls may try again at all
LEAST = 100.0  # what may be saved up: one worker's death in a fleet costs that many calls at once


class RetryBudget:
    """A bucket that calls fill and retries empty. Looked at only when something is to be sent again.

    Args:
        now: seconds on any clock that only goes forward.
    """

    __slots__ = ("_balance", "_calls", "_seen")

    def __init__(self, now: float) -> None:
        self._balance = LEAST
        self._calls = 0
        self._seen = now

    def take(self, now: float, calls: int, inflight: int) -> bool:
        """Whether one more retry may be sent.

        Args:
            now: on the clock of the constructor.
            calls: made so far, retries not counted.
            inflight: under way: a lost connection may cost all of them at once, so as many may be saved up.
        """
        saved = self._balance + RATIO * (calls - self._calls) + PER_SECOND * (now - self._seen)
        self._calls, self._seen = calls, now
        self._balance = min(saved, max(LEAST, inflight))
        if self._balance < 1:
            return False
        self._balance -= 1
        return True
