"""The rotation: an instance is out of it after its connection was lost or could not be made.

It leaves at once, long before discovery would notice, and returns when a probe reaches it.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping
from types import MappingProxyType

import msgspec

from triton_distributed.names import Instance

FIRST_PROBE_S = 0.05  # seconds until the first probe: about the time in which a restarted worker answers again
LAST_PROBE_S = 5.0  # longest wait between probes: a dead worker costs each client one connection attempt in this time


class Down(msgspec.Struct, frozen=True):
    """Why and until when an instance is out of rotation.

    Attributes:
        since: time when the instance went down, on the clock of `mark_down`.
        failures: number of failures to reach it since.
        next_probe: time of the next probe, on the same clock.
    """

    since: float
    failures: int
    next_probe: float


class Rotation:
    """The instances that are out of rotation, and when to probe each of them.

    The table is bounded by discovery's: `forget` drops the instances that discovery no longer lists.

    Args:
        rng: spreads the probes of many clients: each probe waits between half of its step and all of it.
    """

    __slots__ = ("_available", "_down", "_given", "_rng", "down")

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._down: dict[int, Down] = {}
        self._given: tuple[Instance, ...] | None = None
        self._available: tuple[Instance, ...] = ()
        self.down: Mapping[int, Down] = MappingProxyType(self._down)
        """The instances out of rotation, by id; a live view."""

    def mark_down(self, instance_id: int, now: float) -> None:
        """Take an instance out of rotation, or note that a probe of it failed.

        The time to the next probe doubles with each failed probe, from `FIRST_PROBE_S` to `LAST_PROBE_S`. Reports
        before the probe is due, e.g. when one lost connection ends many streams, change nothing.

        Args:
            instance_id: the instance that was lost or could not be reached.
            now: seconds on any monotonic clock.
        """
        known = self._down.get(instance_id)
        if known is not None and now < known.next_probe:
            return
        failures = 1 if known is None else known.failures + 1
        # From 2^7 on the limit applies anyway, and the exponent must not grow for ever.
        step = min(FIRST_PROBE_S * 2.0 ** min(failures - 1, 16), LAST_PROBE_S)
        wait = step * (0.5 + 0.5 * self._rng.random())
        self._down[instance_id] = Down(now if known is None else known.since, failures, now + wait)
        if known is None:
            self._given = None

    def mark_up(self, instance_id: int) -> None:
        """Put an instance back into rotation; no effect if it is in rotation."""
        if self._down.pop(instance_id, None) is not None:
            self._given = None

    def forget(self, known_ids: Collection[int]) -> None:
        """Drop the instances that discovery no longer lists.

        Args:
            known_ids: the ids that discovery lists; a set if there are many.
        """
        gone = [instance_id for instance_id in self._down if instance_id not in known_ids]
        for instance_id in gone:
            self.mark_up(instance_id)

    def available(self, instances: tuple[Instance, ...]) -> tuple[Instance, ...]:
        """Return the instances in rotation, or all if none is: to try is better than to refuse.

        The same object is returned while neither the argument nor the rotation changes.
        """
        if not self._down:
            return instances
        if instances is not self._given:
            rest = tuple(each for each in instances if each.id not in self._down)
            self._available = rest if rest and len(rest) < len(instances) else instances
            self._given = instances
        return self._available

    def next_probe(self, instance_id: int) -> float:
        """Return the time of the instance's next probe, on the clock of `mark_down`; minus infinity if not down."""
        known = self._down.get(instance_id)
        return known.next_probe if known is not None else float("-inf")
