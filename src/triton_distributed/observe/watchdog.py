"""A thread that notices a stuck event loop, says what blocks it, and has others told: the loop cannot.

The loop leaves a mark of the time four times in each limit; the thread sleeps until the newest mark is as old as the
limit. So a loop that stands still is noticed within the limit, and one that stood still for less than three quarters of
it never is. Nothing is done for a request.

Not every old mark is a stuck loop. A process that was stopped, or got no processor, has a watchdog that overslept as
well, without having used the processor meanwhile: the time it overslept is not counted. One that overslept while the
process worked was kept from running by something that held the interpreter's lock, and then the loop was too.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import sysconfig
import threading
import time
import traceback
from bisect import bisect_left
from collections.abc import Callable
from types import CodeType, FrameType

logger = logging.getLogger("triton_distributed.watchdog")

LAG_BOUNDS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0)
BEATS = 4  # marks in one limit: more would tell no more than a quarter of a limit less, and cost as much again
AGAIN_S = 1.0  # while the loop is stuck: between two looks whether it was closed, or others can be told by now
QUIET_S = 10.0  # a handler that blocks the loop at every request must not fill a disk
MOST_PLACES = 64  # lines of code that blocked the loop and are remembered
DEEPEST = 40  # frames of a stack that are logged, the innermost

_HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_LIBRARIES = tuple(
    os.path.join(path, "")
    for name in ("stdlib", "platstdlib", "purelib", "platlib")
    if (path := sysconfig.get_paths().get(name))
)
_LOOPS = tuple(f"{os.sep}{name}{os.sep}" for name in ("asyncio", "uvloop"))
_TURNS = ("run", "run_forever", "run_until_complete", "_run_once")  # beyond these frames is who started the loop


class LoopStats:
    """How an event loop fares. Plain numbers that one thread each writes and anybody reads.

    Attributes:
        stalls: how often it was stuck for as long as the watchdog waits.
        stalled_s: seconds that those lasted together, those that have ended.
        longest_s: the longest of them.
        lag: how often the loop came to a timer how late: `lag[i]` times by at most `LAG_BOUNDS_S[i]` seconds and more
            than the bound before, and in the last place by more than the last bound.
    """

    __slots__ = ("lag", "longest_s", "stalled_s", "stalls")

    def __init__(self) -> None:
        self.stalls = 0
        self.stalled_s = self.longest_s = 0.0
        self.lag = [0] * (len(LAG_BOUNDS_S) + 1)

    def __repr__(self) -> str:
        return f"<LoopStats stalls={self.stalls} longest_s={self.longest_s:.3g} lag={self.lag}>"


class Watchdog:
    """Watches one event loop from a daemon thread.

    Args:
        loop: what is watched.
        limit_s: seconds within which a stuck loop is noticed; 0 for no watchdog.
        tell: has others know that the loop is stuck (True) or no longer (False). Called in the thread, and again after
            a while where it raised.
        clock: seconds that only go forward.
        cpu: seconds of processor time that the process has used.

    Attributes:
        stats: how the loop fares; all zeros where nothing is watched.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        limit_s: float,
        tell: Callable[[bool], None],
        *,
        clock: Callable[[], float] = time.monotonic,
        cpu: Callable[[], float] = time.process_time,
    ) -> None:
        self.stats = LoopStats()
        self._loop = loop
        self._limit_s, self._beat_s = limit_s, limit_s / BEATS
        self._tell = tell
        self._clock, self._cpu = clock, cpu
        self._thread: threading.Thread | None = None
        self._loop_thread = 0
        self._timer: asyncio.TimerHandle | None = None
        self._wake = threading.Event()
        self._stopped = False
        self._beat_at = 0.0  # the loop's newest mark
        self._runs_loop: CodeType | None = None  # whose call runs a loop that is not written in Python
        # what follows belongs to the thread
        self._due = self._used = 0.0  # when it was to wake, and what the process had used when it went to sleep
        self._since = 0.0  # marks older than this are not held against the loop
        self._stuck_since: float | None = None
        self._place = ""
        self._said = True  # of the present stall
        self._told = self._told_badly = False
        self._quiet: dict[str, tuple[float, int]] = {}  # place → when it was logged, how many since

    def __repr__(self) -> str:
        state = "idle" if self._thread is None else "stuck" if self._stuck_since is not None else "watching"
        return f"<Watchdog {state} limit_s={self._limit_s:g} {self.stats!r}>"

    def start(self) -> None:
        """Begin to watch the loop whose thread this is; once is enough."""
        if self._thread is not None or not self._limit_s or self._stopped:
            return
        self._loop_thread = threading.get_ident()
        self._beat_at = self._since = self._clock()
        self._schedule(self._beat_at)
        self._sleep(self._limit_s, self._beat_at)
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
            thread.join(AGAIN_S)  # it is asleep, or telling others: a small file's time

    def release_in_child(self) -> None:
        """This process is a fork, which the thread is not in."""
        self._stopped, self._thread = True, None

    # on the loop

    def _schedule(self, now: float) -> None:
        self._next_beat = now + self._beat_s
        self._timer = self._loop.call_later(self._beat_s, self._beat)

    def _beat(self) -> None:
        now = self._clock()
        self.stats.lag[bisect_left(LAG_BOUNDS_S, now - self._next_beat)] += 1
        self._beat_at = now
        if self._runs_loop is None and not isinstance(self._loop, asyncio.BaseEventLoop):
            self._runs_loop = sys._getframe(1).f_code
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
            except Exception:  # it must watch on
                logger.exception("the watchdog of the event loop failed")
                wait_s = AGAIN_S

    def look(self) -> float:
        """Judge the loop by its newest mark; returns seconds until the next look."""
        now, used = self._clock(), self._cpu()
        if self._stuck_since is None:
            overslept_s = now - self._due
            if overslept_s > self._beat_s and used - self._used < overslept_s / 2:
                self._since = now
            since = max(self._since, self._beat_at)
            if now < since + self._limit_s:
                self._tell_others()  # what could not be told before
                return self._sleep(since + self._limit_s - now, now)
            frame = sys._current_frames().get(self._loop_thread)
            if frame is None or self._waits(frame) or not self._loop.is_running():
                self._since = now
                return self._sleep(self._limit_s, now)
            self._began(frame, now)
        elif self._beat_at > self._stuck_since:
            self._ended()
        self._tell_others()
        return self._sleep(AGAIN_S if self._stuck_since is not None else self._limit_s, now)

    def _waits(self, frame: FrameType) -> bool:
        """Whether the loop waits for the kernel, and is late only because the machine is.

        uvloop has no frame of its own: the innermost one is then of the code that runs the loop.
        """
        code = frame.f_code
        return code is self._runs_loop or (
            code.co_name == "select" and os.path.basename(code.co_filename) == "selectors.py"
        )

    def _sleep(self, wait_s: float, now: float) -> float:
        self._due, self._used = now + wait_s, self._cpu()
        return wait_s

    def _began(self, frame: FrameType, now: float) -> None:
        self._stuck_since = self._beat_at
        self.stats.stalls += 1
        file, line, function = _blame(frame)
        self._place = f"{file}:{line} in {function}"
        since, unsaid = self._quiet.get(self._place, (now - QUIET_S, 0))
        self._said = now - since >= QUIET_S
        if not self._said:
            self._quiet[self._place] = (since, unsaid + 1)
            return
        if len(self._quiet) >= MOST_PLACES:
            self._quiet.clear()
        self._quiet[self._place] = (now, 0)
        logger.warning(
            "the event loop is stuck at %s, for %.2f s so far%s: this process answers nobody meanwhile. What blocks "
            "belongs into a handler written with plain `def`, or into asyncio.to_thread. Its stack:\n%s",
            self._place,
            now - self._beat_at,
            f" ({unsaid} times more since the last report)" if unsaid else "",
            _stack(frame),
        )

    def _ended(self) -> None:
        assert self._stuck_since is not None
        # Between the last mark and the one that was due next the loop did turn: what is counted is the least it can be.
        length_s = max(0.0, self._beat_at - self._stuck_since - self._beat_s)
        self._stuck_since = None
        self.stats.stalled_s += length_s
        self.stats.longest_s = max(self.stats.longest_s, length_s)
        level = logging.WARNING if self._said else logging.DEBUG
        logger.log(level, "the event loop turns again: it was stuck for %.2f s at %s", length_s, self._place)

    def _tell_others(self) -> None:
        stuck = self._stuck_since is not None
        if self._told is stuck:
            return
        try:
            self._tell(stuck)
        except Exception as error:
            if not self._told_badly:
                words = "that it is stuck" if stuck else "that the event loop turns again"
                logger.warning("clients cannot be told %s: %s; trying again", words, error)
            self._told_badly = True
        else:
            self._told, self._told_badly = stuck, False


def _blame(frame: FrameType) -> tuple[str, int, str]:
    """File, line and function of the innermost frame of the user's own code; of a library's, of anybody's, else."""
    library: FrameType | None = None
    each: FrameType | None = frame
    while each is not None:
        file, name = each.f_code.co_filename, each.f_code.co_name
        loop = any(part in file for part in _LOOPS)
        if loop and name in _TURNS:
            break
        if not loop and not file.startswith((_HERE, "<frozen")):
            if not file.startswith(_LIBRARIES):
                return file, each.f_lineno, name
            library = library or each
        each = each.f_back
    found = library or frame
    return found.f_code.co_filename, found.f_lineno, found.f_code.co_name


def _stack(frame: FrameType) -> str:
    summary = traceback.StackSummary.extract(traceback.walk_stack(frame), limit=DEEPEST)
    summary.reverse()
    return "".join(summary.format()).rstrip()
