"""Ejection of the outliers of one endpoint: the timers, the log entries and the effects on clients.

While no call fails, an answered call only checks one flag. A first failure opens a period. Answers are counted only
during the period, and at its end all outcomes are forgotten.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable

from triton_distributed.names import EndpointName, Instance
from triton_distributed.observe import OutlierStats
from triton_distributed.routing.outliers import Ejection, Outliers

logger = logging.getLogger("triton_distributed.runtime")

PERIOD_S = 60.0
"""Seconds in which calls are counted. A client that makes one call in ten seconds can still see five failures in this
time, as many as an ejection needs. Older outcomes say little."""


class Ejector:
    """Ejects the outliers of one endpoint, and puts them back into rotation.

    Args:
        name: the endpoint, for the log.
        loop: the running loop.
        rng: see `Outliers`.
        first_s: seconds of a first ejection; 0 if no instance may be ejected.
        on_change: called when an instance was ejected or has returned.

    Attributes:
        counting: a call has failed in this period, so each call that ends well must be passed to `answered`.
        answered: `Outliers.answered`.
        outliers: the outcomes, and the instances that are left out.
        stats: counters.
    """

    __slots__ = (
        "_closed",
        "_first_s",
        "_instances",
        "_loop",
        "_name",
        "_on_change",
        "_period",
        "_return",
        "answered",
        "counting",
        "outliers",
        "stats",
    )

    def __init__(
        self,
        name: EndpointName,
        loop: asyncio.AbstractEventLoop,
        rng: random.Random,
        first_s: float,
        on_change: Callable[[], None],
    ) -> None:
        self._name = name
        self._loop = loop
        self._first_s = first_s
        self._on_change = on_change
        self.outliers = Outliers(rng, first_s)
        self.answered = self.outliers.answered
        self.stats = OutlierStats()
        self.counting = self._closed = False
        self._instances: tuple[Instance, ...] = ()
        self._period: asyncio.TimerHandle | None = None
        self._return: asyncio.TimerHandle | None = None  # The end of the next ejection.

    def changed(self, instances: tuple[Instance, ...]) -> None:
        """Note which instances are in rotation now."""
        self._instances = instances
        self.stats.out = len(self.outliers.ejected)

    def close(self) -> None:
        """Stop counting and end the timers."""
        self._closed, self.counting = True, False
        for timer in (self._period, self._return):
            if timer is not None:
                timer.cancel()
        self._period = self._return = None

    def failed(self, instance_id: int, cause: int | None = None, began: float | None = None) -> None:
        """Note that a call failed, perhaps because of its instance.

        Args:
            instance_id, cause, began: see `Outliers.failed`.
        """
        if len(self._instances) < 2 or not self._first_s or self._closed:
            return
        if not self.counting:
            self.counting = True
            self._period = self._loop.call_later(PERIOD_S, self._period_over)
        ejection = self.outliers.failed(instance_id, self._loop.time(), self._instances, cause, began)
        if ejection is not None:
            self._ejected(ejection)

    def _period_over(self) -> None:
        self._period, self.counting = None, False
        self.outliers.restart()

    def _ejected(self, ejection: Ejection) -> None:
        self.stats.ejections += 1
        logger.warning(
            '"%s": instance %d is left out for %.3g s: %s%s',
            self._name,
            ejection.instance_id,
            ejection.until - ejection.since,
            ejection.reason,
            f" (ejected {ejection.times} times recently)" if ejection.times > 1 else "",
        )
        self._await_return()
        self._on_change()

    def _await_return(self) -> None:
        due = self.outliers.next_return()
        if self._return is not None:
            self._return.cancel()
        self._return = self._loop.call_at(due, self._returned) if due is not None and not self._closed else None

    def _returned(self) -> None:
        self._return = None
        back = self.outliers.readmit(self._loop.time())
        self._await_return()  # Needed also if the timer was early by less than the clock's resolution.
        if back:
            logger.info('"%s": back in rotation: instance %s', self._name, ", ".join(map(str, back)))
            self._on_change()
