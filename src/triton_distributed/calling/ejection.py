"""One endpoint's outliers on an event loop: which calls are timed, when the evidence is looked at, who is told.

A call that is answered looks at two numbers, no more. Failures are counted as they come, and answers as long as there
were failures lately; times are taken of a few calls between two looks. The timer runs while there is something to see.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

from triton_distributed.names import EndpointName, Instance
from triton_distributed.observe import OutlierStats
from triton_distributed.routing.outliers import Ejection, Outliers
from triton_distributed.transport.stream import Stream, TimedStream

if TYPE_CHECKING:
    pass

logger = logging.getLogger("triton_distributed.runtime")

LOOK_S = 1.0  # between two looks: several make a judgement, and it is to be there within seconds
TIMED = 8  # calls an instance that are timed between two looks: enough for a judgement in three of them
MOST_TIMED = 512  # of all instances together: a look must cost the loop no more than some milliseconds
MOST_WAITING = 4 * MOST_TIMED  # timed calls without an answer yet; while there are as many, no further one is timed
AGAIN_S = 0.1  # after a look at one that found nothing: its failures may be here before its peers' answers
QUICK_LOOKS = 16  # at single instances between two looks at all: each adds up what all have done


class Ejector:
    """Ejects outliers of one endpoint, and lets them come back.

    Args:
        name: of the endpoint, for the log.
        loop: the running loop.
        rng: see `Outliers`.
        first_s: seconds of a first ejection; 0: nobody is ever ejected.
        on_change: called when somebody was ejected or came back.

    Attributes:
        samples: how many of the next calls are to be timed; 0 at most times.
        counting: calls that end well are to be counted in `answered`: others have failed lately.
        outliers: the evidence, and who is out.
        answered: of `outliers`: calls that ended well, by instance id.
        stats: counters.
    """

    __slots__ = (
        "_again",
        "_closed",
        "_first_s",
        "_instances",
        "_loop",
        "_name",
        "_news",
        "_next",
        "_on_change",
        "_quick_looks",
        "_return",
        "_timer",
        "_waiting",
        "answered",
        "counting",
        "outliers",
        "samples",
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
        self.samples = 0
        self._quick_looks = QUICK_LOOKS
        self._instances: tuple[Instance, ...] = ()
        self._waiting: dict[int, tuple[int, float]] = {}  # timed calls without an answer: instance, since when
        self._next = 0  # key of the next of them
        self._news = self._closed = self.counting = False
        self._timer: asyncio.TimerHandle | None = None  # to the next look
        self._again: asyncio.TimerHandle | None = None  # to another look at one of them
        self._return: asyncio.TimerHandle | None = None  # to the end of the next ejection

    @property
    def _comparing(self) -> bool:
        return len(self._instances) > 1 and self._first_s > 0 and not self._closed

    def changed(self, instances: tuple[Instance, ...]) -> None:
        """These are in rotation now."""
        self._instances = instances
        if not self._comparing:
            self.samples, self.counting = 0, False
        elif self._timer is None:
            self._refill()
        self.stats.out = len(self.outliers.ejected)

    def close(self) -> None:
        """Look no more."""
        self._closed = True
        self.samples = 0
        for timer in (self._timer, self._again, self._return):
            if timer is not None:
                timer.cancel()
        self._timer = self._again = self._return = None

    # what calls tell

    def watch(self, stream: Stream, instance_id: int) -> None:
        """Time the first message of a new `TimedStream`; one of the `samples` is used up."""
        assert isinstance(stream, TimedStream)
        self.samples -= 1
        key = self._next = self._next + 1
        self._waiting[key] = (instance_id, self._loop.time())
        stream.watcher = lambda answered: self._told(key, answered)
        self._look_soon()

    def _told(self, key: int, answered: bool) -> None:
        instance_id, since = self._waiting.pop(key, (0, 0.0))
        if instance_id:
            note = self.outliers.timed if answered else self.outliers.left
            note(instance_id, self._loop.time() - since)

    def failed(self, instance_id: int, cause: int | None = None, began: float | None = None) -> None:
        """A call to the instance failed, and that may be its fault.

        Args:
            cause: what it has in common with others: a connection that was lost ends many.
            began: when the call began, on the loop's clock, where that is known.
        """
        if not self._comparing:
            return
        self.counting = True
        look = self.outliers.failed(instance_id, cause, began)
        self._look_soon()
        if look and self._quick_looks:
            self._quick_looks -= 1
            if not self._look_at(instance_id) and self._again is None:
                self._again = self._loop.call_later(AGAIN_S, self._look_again, instance_id)

    # looking

    def _look_soon(self) -> None:
        self._news = True
        if self._timer is None and not self._closed:
            self._timer = self._loop.call_later(LOOK_S, self._look)

    def _look_at(self, instance_id: int) -> bool:
        ejection = self.outliers.look_at(instance_id, self._loop.time(), self._instances)
        self._ejected(ejection)
        return ejection is not None

    def _look_again(self, instance_id: int) -> None:
        self._again = None
        self._look_at(instance_id)

    def _look(self) -> None:
        self._timer = None
        now = self._loop.time()
        waiting = [(instance_id, now - since) for instance_id, since in self._waiting.values()]
        ejection = self.outliers.look(now, self._instances, waiting) if self._comparing else None
        if self.counting:
            self.counting = not self.outliers.calm()
        self._refill()
        news, self._news = self._news, False
        if (news or waiting) and self._comparing:
            self._timer = self._loop.call_later(LOOK_S, self._look)
        self._ejected(ejection)

    def _refill(self) -> None:
        self._quick_looks = QUICK_LOOKS
        room = min(MOST_WAITING - len(self._waiting), MOST_TIMED, TIMED * len(self._instances))
        self.samples = max(0, room) if self._comparing else 0

    # who is out

    def _ejected(self, ejection: Ejection | None) -> None:
        if ejection is None:
            return
        self.stats.ejections += 1
        logger.warning(
            '"%s": instance %d is left out for %.3g s: %s%s',
            self._name.path,
            ejection.instance_id,
            ejection.until - ejection.since,
            ejection.reason,
            f" (for the {ejection.times}th time)" if ejection.times > 1 else "",
        )
        self._no_longer_wait_for((ejection.instance_id,))
        self._await_return()
        self._on_change()

    def _no_longer_wait_for(self, ids: Collection[int]) -> None:
        """What these took before their return says nothing of them after it."""
        self._waiting = {key: each for key, each in self._waiting.items() if each[0] not in ids}

    def _await_return(self) -> None:
        due = self.outliers.next_return()
        if self._return is not None:
            self._return.cancel()
        self._return = self._loop.call_at(due, self._returned) if due is not None and not self._closed else None

    def _returned(self) -> None:
        self._return = None
        back = self.outliers.readmit(self._loop.time())
        self._await_return()  # also where a timer was early by less than the clock's grain
        if back:
            self._no_longer_wait_for(back)
            logger.info('"%s": back in rotation: instance %s', self._name.path, ", ".join(map(str, back)))
            self._on_change()
