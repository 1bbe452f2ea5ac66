"""One timer for the progress timeouts of all answers of a model."""

from __future__ import annotations

import asyncio
import weakref
from typing import Final, Protocol

STALL_TIMEOUT_S: Final = 30.0
"""Seconds without an output after which a worker has stalled."""

FIRST: Final = 4
"""The first output of a worker may take this many times the timeout, from the beginning of its handler: the whole
prompt is computed before it. The time in the worker's queue does not count, since admission bounds the queue."""

_LATE: Final = 1 / 32
"""The part of the timeout by which an answer may be looked at too late, so that many answers do not mean many looks."""


_FIRST_MOST: Final = 1024


class Watched(Protocol):
    """What `StallWatch` watches."""

    def watch(self) -> float | None:
        """Act if a limit is reached. Returns the seconds until the next look, at most the timeout; None for no more."""


class StallWatch:
    """Looks at answers before they can have reached a limit, and again after the time that each one returns.

    It keeps none of them alive.

    A timer for each answer would cost more than the rest of its watching.

    Args:
        timeout_s: seconds that an answer that was just added has at least.
    """

    __slots__ = ("_answers", "_most", "_timer", "timeout_s")

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._answers: list[weakref.ref[Watched]] = []
        self._most = _FIRST_MOST  # With more, those are dropped that are gone: a callback for each would cost more.
        self._timer: asyncio.TimerHandle | None = None

    def add(self, answer: Watched) -> None:
        """Watch an answer from now on."""
        self._answers.append(weakref.ref(answer))
        if len(self._answers) > self._most:
            self._answers = [each for each in self._answers if each() is not None]
            self._most = max(_FIRST_MOST, 2 * len(self._answers))
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self.timeout_s, self._look)

    def _look(self) -> None:
        self._timer = None
        soonest = self.timeout_s
        answers, self._answers = self._answers, []
        for each in answers:
            left = None if (answer := each()) is None else answer.watch()
            if left is not None:
                self._answers.append(each)
                soonest = min(soonest, left)
        if self._answers and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(max(soonest, self.timeout_s * _LATE), self._look)
