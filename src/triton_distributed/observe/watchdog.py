"""A thread that notices a stuck event loop, logs what blocks it, and notifies clients, which the loop cannot do.

The loop marks the time four times per limit; the thread sleeps until the newest mark is as old as the limit. So it
notices a loop that stands still within the limit, and never one that stood still for less than three quarters of it.
A request costs nothing.

Not every old mark is a stuck loop, and not every stuck loop is its program's fault:

- If the process was stopped or got no processor, the watchdog overslept as well, while the process used no processor
  time: the time it overslept is not counted. If it overslept while the process worked, something held the
  interpreter's lock, which blocks the loop too.
- Time for which the loop's thread could have run and got no processor is not counted. Such a process is not marked
  `busy` either: its neighbours are usually starved too, and notifying all clients costs CPU that is missing.
- A loop that runs no callback is idle, however late its mark is.
- Work of the loop itself, or of this package for a program, is logged without advice, e.g. moving 200 MB.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
import time
from bisect import bisect_left
from collections.abc import Callable
from types import FrameType

from triton_distributed.observe.stacks import Blame, Place, blame, callback, loop_place, stack
from triton_distributed.observe.usage import Usage, usage_of_this_thread
from triton_distributed.quiet import Quiet

logger = logging.getLogger("triton_distributed.watchdog")

LAG_BOUNDS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0)

BEATS = 4
"""Marks per limit. More marks would improve accuracy by less than a quarter of the limit, and cost more."""

AGAIN_S = 1.0
"""Seconds between checks of a stuck loop: whether it was closed, or a failed notification can be repeated."""

QUIET_S = 10.0
"""Seconds between two log entries for one line of code: a handler that always blocks the loop must not fill a disk."""
ADVICE = "What blocks belongs in a handler written with plain `def`, or in asyncio.to_thread."


class LoopStats:
    """The stalls and the lag of an event loop. Each number is written by one thread; any thread may read it.

    Attributes:
        stalls: number of stalls that reached the watchdog's limit.
        stalled_s: sum of all stalls in seconds. The one under way is counted once a second.
        longest_s: the longest stall in seconds.
        stuck_s: duration of the stall under way in seconds; 0 while the loop turns.
        lag: histogram of timer delays: `lag[i]` timers ran at most `LAG_BOUNDS_S[i]` seconds late and more than the
            bound before; the last entry counts timers beyond the last bound.
        lag_s: sum of these delays in seconds.
    """

    __slots__ = ("lag", "lag_s", "longest_s", "stalled_s", "stalls", "stuck_s")

    def __init__(self) -> None:
        self.stalls = 0
        self.stalled_s = self.longest_s = self.stuck_s = self.lag_s = 0.0
        self.lag = [0] * (len(LAG_BOUNDS_S) + 1)

    def __repr__(self) -> str:
        return f"<LoopStats stalls={self.stalls} longest_s={self.longest_s:.3g} lag={self.lag}>"


class Watchdog:
    """Watches one event loop from a daemon thread.

    Args:
        loop: the loop to watch.
        limit_s: seconds within which a stuck loop is noticed; 0 for no watchdog.
        tell: notifies clients that the loop is stuck (True) or turns again (False). It is called in the thread, and
            again later if it raised.
        clock: returns monotonic seconds.
        fields: returns the log's fields for the request whose handler has the loop. It is called in the thread.
        usage: returns the usage of the loop's thread; by default of the thread that calls `start`.

    Attributes:
        stats: the loop's statistics; all zeros if it is not watched.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        limit_s: float,
        tell: Callable[[bool], None],
        *,
        clock: Callable[[], float] = time.monotonic,
        fields: Callable[[], dict[str, str]] = dict,
        usage: Callable[[], Usage] | None = None,
    ) -> None:
        self.stats = LoopStats()
        self._loop = loop
        self._limit_s, self._beat_s = limit_s, limit_s / BEATS
        self._tell = tell
        self._clock, self._fields, self._usage = clock, fields, usage
        self._thread: threading.Thread | None = None
        self._loop_thread = 0
        self._timer: asyncio.TimerHandle | None = None
        self._wake = threading.Event()
        self._stopped = False
        self._beat_at = 0.0  # time of the loop's newest mark
        self._place: Place | None = None  # the place that runs the loop, if the loop is written in C
        # the attributes below belong to the thread
        self._looked_at = self._due = 0.0  # when the thread went to sleep, and when it should wake
        self._used = Usage(0.0)  # usage when the thread went to sleep
        self._since = 0.0  # a stall is counted from this time at the earliest
        self._stuck_since: float | None = None
        self._blame: Blame | None = None  # the code that causes the present stall
        self._logged = True  # the present stall was logged
        self._notified = self._notify_failed = False
        self._quiet = Quiet(QUIET_S, clock)  # by place in the code

    def __repr__(self) -> str:
        state = "idle" if self._thread is None else "stuck" if self._stuck_since is not None else "watching"
        return f"<Watchdog {state} limit_s={self._limit_s:g} {self.stats!r}>"

    def start(self) -> None:
        """Begin to watch the loop, on the loop's thread; further calls have no effect."""
        if self._thread is not None or not self._limit_s or self._stopped:
            return
        self._loop_thread = threading.get_ident()
        self._usage = self._usage or usage_of_this_thread()
        self._beat_at = self._since = self._next_beat = self._clock()
        self._loop.call_soon(self._beat)  # through the loop, to learn how it calls callbacks
        self._sleep(self._limit_s, self._beat_at, self._usage())
        self._thread = threading.Thread(target=self._run, name="triton-watchdog", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop watching, on the loop's thread; the thread has ended when this returns."""
        self._stopped = True
        if self._timer is not None:
            self._timer.cancel()
        self._wake.set()
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.join(AGAIN_S)  # it sleeps, or writes a small file to notify clients

    # on the loop

    def _schedule(self, now: float) -> None:
        self._next_beat = now + self._beat_s
        self._timer = self._loop.call_later(self._beat_s, self._beat)

    def _beat(self) -> None:
        self._place = loop_place(sys._getframe(1))
        now = self._clock()
        late_s = max(0.0, now - self._next_beat)
        self.stats.lag[bisect_left(LAG_BOUNDS_S, late_s)] += 1
        self.stats.lag_s += late_s
        self._beat_at = now
        if self._stuck_since is not None:
            self._wake.set()
        if not self._stopped:
            self._schedule(now)

    # in the thread

    def _run(self) -> None:
        wait_s = self._limit_s
        while not self._loop.is_closed():
            self._wake.wait(wait_s)
            self._wake.clear()
            if self._stopped:
                return
            try:
                wait_s = self.look()
            except Exception:  # the watchdog must go on
                logger.exception("the watchdog of the event loop failed")
                wait_s = AGAIN_S

    def look(self) -> float:
        """Judge the loop by its newest mark; returns seconds until the next check."""
        now, used = self._clock(), self._usage() if self._usage is not None else Usage(0.0)
        if self._stuck_since is None:
            overslept_s = now - self._due
            if overslept_s > self._beat_s and used.process - self._used.process < overslept_s / 2:
                self._since = now
            since, shortest_s = max(self._since, self._beat_at), 0.0
            starved_s = used.starved - self._used.starved
            if starved_s > self._beat_s / 2:
                shortest_s = self._beat_s / 2  # else checks would become ever more frequent
                since = self._since = min(now, since + starved_s)
            if now < since + self._limit_s:
                self._notify()  # repeats a failed notification
                return self._sleep(max(shortest_s, since + self._limit_s - now), now, used)
            frame = sys._current_frames().get(self._loop_thread)
            frames = None if frame is None else callback(frame, self._place)
            if frame is None or frames is None or not self._loop.is_running():
                self._since = now
                return self._sleep(self._limit_s, now, used)
            self._began(blame(frames or [frame]), frame, now, used)
        elif self._beat_at > self._stuck_since:
            self._ended()
        else:
            self._count(now)
        self._notify()
        return self._sleep(AGAIN_S if self._stuck_since is not None else self._limit_s, now, used)

    def _sleep(self, wait_s: float, now: float, used: Usage) -> float:
        self._looked_at, self._due, self._used = now, now + wait_s, used
        return wait_s

    def _began(self, found: Blame, frame: FrameType, now: float, used: Usage) -> None:
        self._stuck_since = self._beat_at
        self.stats.stalls += 1
        self._count(now)
        self._blame = found
        place = str(found)
        suppressed = self._quiet.due(place)
        self._logged = suppressed is not None
        if not self._logged:
            return
        logger.warning(
            "the event loop is %s %s, for %.2f s so far%s: this process answers no calls meanwhile. %s Its stack:\n%s",
            "stuck at" if found.theirs else "held up at",
            place,
            now - self._beat_at,
            f" ({suppressed} times more since the last report)" if suppressed else "",
            ADVICE if found.theirs else self._own(now, used),
            stack(frame),
            extra=self._fields(),
        )

    def _own(self, now: float, used: Usage) -> str:
        """Describe the work of the loop itself or of this package, by the processor times since the last check."""
        if used.loop is None or self._used.loop is None:
            return "It is not at work in a handler."
        loop_s = used.loop - self._used.loop
        others_s = used.process - self._used.process - loop_s
        half_s = (now - self._looked_at - (used.starved - self._used.starved)) / 2  # half of the time not starved
        if loop_s >= half_s:
            return "It moves, encodes or decodes much data."
        if others_s >= half_s:
            return f"It waits, while other threads computed for {others_s:.2f} s and may have held the interpreter."
        return "It waits for the operating system."

    def _count(self, until: float) -> float:
        """Count the stall under way up to a time, and return its duration so far.

        `until` is never later than the mark that will end the stall, so the sum of all stalls never decreases.
        """
        assert self._stuck_since is not None
        # The loop did turn between its last mark and the next due one, so this is the least that the stall can be.
        length_s = max(0.0, until - self._stuck_since - self._beat_s)
        self.stats.stalled_s += max(0.0, length_s - self.stats.stuck_s)
        self.stats.longest_s = max(self.stats.longest_s, length_s)
        self.stats.stuck_s = length_s
        return length_s

    def _ended(self) -> None:
        length_s = self._count(self._beat_at)
        self._stuck_since, self.stats.stuck_s = None, 0.0
        level = logging.WARNING if self._logged else logging.DEBUG
        logger.log(level, "the event loop turns again: it was stuck for %.2f s at %s", length_s, self._blame)

    def _notify(self) -> None:
        stuck = self._stuck_since is not None
        if self._notified is stuck:
            return
        try:
            self._tell(stuck)
        except Exception as error:  # A discovery backend may raise anything, and the watchdog must go on.
            if not self._notify_failed:
                words = "is stuck" if stuck else "turns again"
                logger.warning("cannot notify clients that the event loop %s: %s; trying again", words, error)
            self._notify_failed = True
        else:
            self._notified, self._notify_failed = stuck, False
