"""Rate limits for log entries. Rooms below `observe/` log as well, so this file is next to errors and names."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator

__all__: list[str] = []  # Only this package uses it.


class Quiet:
    """Limits how often the same thing is logged, and counts what is suppressed.

    Args:
        every_s: seconds between two entries with the same key; infinite for one entry until `forget` or `clear`.
        clock: returns seconds that only grow.
        most: keys that are remembered; the oldest is forgotten first.

    Iterating yields the remembered keys.
    """

    __slots__ = ("_clock", "_every_s", "_logged", "_most")

    def __init__(
        self, every_s: float = float("inf"), clock: Callable[[], float] = time.monotonic, *, most: int = 64
    ) -> None:
        self._every_s = every_s
        self._clock = clock
        self._most = most
        self._logged: dict[Hashable, tuple[float, int]] = {}  # Key → time of its last entry, number suppressed since.

    def due(self, key: Hashable = None) -> int | None:
        """Decide whether to log: return the number of entries suppressed since the last one, or None to suppress."""
        now = self._clock()
        at, suppressed = self._logged.get(key, (None, 0))
        if at is not None and now - at < self._every_s:
            self._logged[key] = (at, suppressed + 1)
            return None
        if at is None and len(self._logged) >= self._most:
            del self._logged[next(iter(self._logged))]
        self._logged[key] = (now, 0)
        return suppressed

    def forget(self, key: Hashable) -> None:
        """Log this key again the next time. Unknown keys are ignored."""
        self._logged.pop(key, None)

    def clear(self) -> None:
        """Log every key again the next time."""
        self._logged.clear()

    def __iter__(self) -> Iterator[Hashable]:
        return iter(self._logged)
