"""When a replica that has ended starts again. No I/O, no clock."""

from __future__ import annotations

from collections.abc import Callable

STEADY_S = 30.0
"""Seconds for which a replica must have been ready, so that its earlier ends no longer count."""

FIRST_S = 0.5
LONGEST_S = 30.0
"""Seconds before the second start in a row, doubled each time, up to the longest. A fault that needs an operator costs
two starts a minute, and a replica is back within half a minute after the fault is gone."""

FAILING = 5
"""Ends in a row after which a replica is failing."""


class Restarts:
    """Counts the ends of one replica.

    Args:
        random: returns a number from 0 to 1. Replicas that end for one cause do not all start at the same moment.
    """

    def __init__(self, random: Callable[[], float]) -> None:
        self._random = random
        self.in_a_row = 0

    @property
    def failing(self) -> bool:
        """Whether the replica ends again and again."""
        return self.in_a_row >= FAILING

    def ended(self, ready_s: float) -> float:
        """Count an end that no one asked for, and return the seconds to wait before the next start.

        Args:
            ready_s: seconds for which the replica had been ready; 0 if it was not.
        """
        self.in_a_row = 1 if ready_s >= STEADY_S else self.in_a_row + 1
        if self.in_a_row == 1:
            return 0.0
        doublings = min(self.in_a_row - 2, 30)
        return min(FIRST_S * float(1 << doublings), LONGEST_S) * (0.5 + self._random() / 2)
