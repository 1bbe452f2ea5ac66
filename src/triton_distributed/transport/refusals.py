"""One line in the log for peers that were turned away, however many they are."""

from __future__ import annotations

import logging
from collections.abc import Callable

logger = logging.getLogger("triton_distributed.transport")

# Two lines are this many seconds apart: an attack must not fill a disk.
EVERY_S = 10.0


class Refusals:
    """Logs peers that were turned away before they were members.

    Args:
        clock: seconds that only grow.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._next = float("-inf")
        self._unsaid = 0

    def note(self, peer: str, reason: str) -> None:
        """`peer` was turned away; a line is written unless one was within `EVERY_S`."""
        now = self._clock()
        if now < self._next:
            self._unsaid += 1
            return
        more = f" (and {self._unsaid:,} more since the last such line)" if self._unsaid else ""
        logger.warning("turned %s away: %s%s", peer, reason, more)
        self._next = now + EVERY_S
        self._unsaid = 0
