"""The threads of handlers written with plain `def`: how many run at once, and which one runs next.

A computation keeps one thread from its first step to its last. `TRD_THREADS` bounds how many computations run at once.
A generator that waits for its reader keeps its thread and gives its place to others until it can continue.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterable
from itertools import count

logger = logging.getLogger("triton_distributed.runtime")

# The number of generators that may wait for their readers at once, each with its own thread. Such a thread costs about
# 100 KB of memory and no time, and most containers may have a few thousand. Further work waits for a thread.
MOST_PARKED = 1_000

STUCK_S = 3.0
"""Seconds after which a warning is logged if work waits and there is no progress."""

SAID_AGAIN_S = 60.0
"""The smallest number of seconds between two warnings about a standstill."""

MOST_NAMED = 5
"""The largest number of handlers that a warning about a standstill names."""


class Computation:
    """Work that runs in one thread of the pool from its first step to its last.

    Attributes:
        name: the handler's name, for the log.
        thread: the thread that runs the work; None before the work begins and after it has ended.
        since: when the work began to wait for a place, on the loop's clock.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.thread: _Thread | None = None
        self.since = 0.0

    def run(self) -> None:
        """Do all of the work, in the thread. This raises nothing."""
        raise NotImplementedError

    def must_wait(self) -> bool:
        """Whether parked work waits for its reader. Called with the pool's lock held, in either thread."""
        raise NotImplementedError

    def stop(self) -> None:
        """End at the next step: the pool was closed while the work waited."""
        raise NotImplementedError

    def left(self) -> None:
        """The work has ended, and its thread is free for other work. Called in the thread."""
        raise NotImplementedError


class _Thread(threading.Thread):
    """A thread of the pool. It is a daemon, so the interpreter does not wait for it at its end.

    The interpreter joins the threads of the standard pool. One handler stuck in C code would keep a drained worker
    alive for ever.

    Attributes:
        turn: released to let the thread continue.
        work: the work of the next turn; None to end.
    """

    def __init__(self, pool: HandlerThreads, number: int) -> None:
        super().__init__(name=f"trd-handler_{number}", daemon=True)
        self._pool = pool
        self.turn = threading.Lock()
        self.turn.acquire()
        self.work: Computation | None = None

    def run(self) -> None:
        while True:
            self.turn.acquire()
            work, self.work = self.work, None
            if work is None:
                return
            work.run()
            fresh = self._pool.ended(work)
            work.left()
            del work  # An idle thread must not keep a request alive.
            self._pool.start(fresh)


class HandlerThreads:
    """The pool of threads. It makes threads when they are needed and uses them again.

    Args:
        most: computations that run at once. Further work waits in order of arrival; its amount is bounded by
            `serve_endpoint(max_inflight=)` and `TRD_MAX_REQUESTS`.
        inline: there are no threads, because the loop's time is virtual: all work runs on the loop.
    """

    def __init__(self, most: int, inline: bool = False) -> None:
        self.most = most
        self.inline = inline
        self._lock = threading.Lock()  # Guards what follows. Its holder never waits for anything.
        self._running: dict[Computation, None] = {}  # Work that has a place, at most `most`.
        self._parked: dict[Computation, None] = {}  # Work that waits for its reader.
        self._waiting: OrderedDict[Computation, None] = OrderedDict()  # Work that waits for a place, oldest first.
        self._threadless: OrderedDict[Computation, None] = OrderedDict()  # Work for which no thread could be started.
        self._idle: list[_Thread] = []  # At most `most` threads. The one that became free last is used first.
        self._threads = 0  # The number of threads that exist or are about to be started.
        self._numbers = count()
        self._progress = 0  # Grows when a computation begins, ends, parks or continues.
        self._closed = False
        # Only the loop's thread uses what follows.
        self._starter: threading.Thread | None = None
        self._fresh: queue.SimpleQueue[list[_Thread] | None] = queue.SimpleQueue()  # For the starter. None ends it.
        self._timer: asyncio.TimerHandle | None = None  # Set while work waits.
        self._said_at = float("-inf")
        self._said = False  # The present standstill was logged.

    def counts(self) -> tuple[int, int, int, int]:
        """The numbers of running, parked and waiting computations, and of threads."""
        with self._lock:
            waiting = len(self._waiting) + len(self._threadless)
            return len(self._running), len(self._parked), waiting, self._threads

    # Methods for the loop's thread.

    def submit(self, work: Computation) -> None:
        """Run `work` in a thread, now or when a place is free.

        Raises:
            RuntimeError: the pool was closed, or it has no thread and the system has none either.
        """
        with self._lock:
            if self._closed:
                raise RuntimeError("the runtime was shut down")
            self._waiting[work] = None
            fresh = self._fill()
            alone, waits = self._threads == len(fresh), work.thread is None
        if alone and fresh:
            try:
                fresh[0].start()
            except RuntimeError:
                self._take_back(fresh[0])
                raise
        else:
            self._start_later(fresh)
        if waits:
            self._waits(work)

    def withdraw(self, work: Computation) -> bool:
        """Take back work that has not begun. False if it has begun."""
        with self._lock:
            for line in (self._waiting, self._threadless):
                if work.thread is None and work in line:
                    del line[work]
                    return True
        return False

    def go_on(self, work: Computation) -> None:
        """Let `work` continue as soon as it has a place, if it is parked and does not have to wait any more."""
        with self._lock:
            if work not in self._parked or work.must_wait():
                return
            del self._parked[work]
            self._waiting[work] = None
            fresh = self._fill()
            waits = work in self._waiting
        self._start_later(fresh)
        if waits:
            self._waits(work)

    def close(self) -> None:
        """Take no more work. Waiting work is done, parked work is stopped, and then the threads end."""
        with self._lock:
            self._closed = True
            for work in self._parked:
                work.stop()
                self._waiting[work] = None
            self._parked.clear()
            for thread in self._idle:
                thread.turn.release()  # A thread without work ends.
            self._threads -= len(self._idle)
            self._idle.clear()
            fresh = self._fill()
        self._start_later(fresh)
        if self._starter is not None:
            self._fresh.put(None)
        if self._timer is not None:
            self._timer.cancel()

    def _start_later(self, threads: list[_Thread]) -> None:
        """Let another thread start these threads: `Thread.start` may take milliseconds."""
        if not threads:
            return
        if self._starter is None:
            starter = threading.Thread(target=self._start_all, name="trd-thread-starter", daemon=True)
            try:
                starter.start()
            except RuntimeError:
                self.start(threads)  # `start` will fail as well, but it handles the failure.
                return
            self._starter = starter
        self._fresh.put(threads)

    def _start_all(self) -> None:
        while (threads := self._fresh.get()) is not None:
            self.start(threads)

    def _waits(self, work: Computation) -> None:
        loop = asyncio.get_running_loop()
        work.since = loop.time()
        if self._timer is None and not self._closed:
            self._timer = loop.call_later(STUCK_S, self._look, loop, self._progress)

    def _look(self, loop: asyncio.AbstractEventLoop, progress: int) -> None:
        """Log a standstill: work has waited for a while, and there is no progress."""
        with self._lock:
            waiting = [*self._threadless, *self._waiting]
            stands = progress == self._progress
            running, parked, now = list(self._running), len(self._parked), self._progress
        self._timer = loop.call_later(STUCK_S, self._look, loop, now) if waiting else None
        if not waiting or not stands:
            self._said = False
            return
        if self._said or loop.time() - self._said_at < SAID_AGAIN_S:
            return
        self._said, self._said_at = True, loop.time()
        waited_s = loop.time() - min(each.since for each in waiting)
        if len(running) >= self.most:
            logger.warning(
                "as many plain handlers run as TRD_THREADS=%d allows, and for %g s none has ended: %s. %d more wait, "
                "the first for %.1f s: %s. If the running handlers wait for the waiting ones, this does not end by "
                "itself: raise TRD_THREADS, or make them async",
                self.most,
                STUCK_S,
                _names(running),
                len(waiting),
                waited_s,
                _names(waiting),
            )
        else:
            logger.warning(
                "no more threads are available for plain handlers: %d are in use, in %d of them generators wait for "
                "their readers. %d handlers wait, the first for %.1f s: %s",
                len(running) + parked,
                parked,
                len(waiting),
                waited_s,
                _names(waiting),
            )

    # Methods for the pool's threads.

    def park(self, work: Computation) -> None:
        """If `work.must_wait()`, give its place back and wait until `go_on`."""
        thread = work.thread
        assert thread is not None
        with self._lock:
            if self._closed:
                work.stop()
            if not work.must_wait():
                return
            del self._running[work]
            self._parked[work] = None
            self._progress += 1
            fresh = self._fill()
        self.start(fresh)
        thread.turn.acquire()

    def ended(self, work: Computation) -> list[_Thread]:
        """Free the place and the thread of `work`. Returns the threads to start."""
        with self._lock:
            thread, work.thread = work.thread, None
            assert thread is not None
            del self._running[work]
            self._progress += 1
            if self._threadless:  # This work was first in line already.
                first, _ = self._threadless.popitem(last=False)
                self._waiting[first] = None
                self._waiting.move_to_end(first, last=False)
            self._idle.append(thread)
            fresh = self._fill()
            if self._idle and self._idle[-1] is thread and (self._closed or len(self._idle) > self.most):
                del self._idle[-1]
                self._threads -= 1
                thread.turn.release()  # A thread without work ends.
        return fresh

    # Methods for any thread.

    def _fill(self) -> list[_Thread]:
        """Give the free places to the work that has waited longest. The caller holds the lock.

        Returns:
            the threads to start after the lock is released.
        """
        fresh: list[_Thread] = []
        while self._waiting and len(self._running) < self.most:
            work, _ = self._waiting.popitem(last=False)
            thread = work.thread
            if thread is None:
                if self._idle:
                    thread = self._idle.pop()
                elif self._threadless or self._threads >= self.most + MOST_PARKED:
                    self._threadless[work] = None
                    continue
                else:
                    self._threads += 1
                    thread = _Thread(self, next(self._numbers))
                    fresh.append(thread)
                thread.work, work.thread = work, thread
            self._running[work] = None
            self._progress += 1
            thread.turn.release()
        return fresh

    def start(self, threads: list[_Thread]) -> None:
        """Start new threads. If the system has no more threads, their work waits until another thread is free."""
        while threads:
            thread = threads.pop()
            try:
                thread.start()
            except RuntimeError:
                work = self._take_back(thread)
                with self._lock:
                    others = self._threads > 0
                    if others:
                        self._threadless[work] = None
                    threads += self._fill()
                if not others:  # The other threads have ended because the pool was closed.
                    work.stop()
                    work.left()

    def _take_back(self, thread: _Thread) -> Computation:
        """Forget a thread that could not be started. Returns its work, which has no place any more."""
        with self._lock:
            self._threads -= 1
            work, thread.work = thread.work, None
            assert work is not None
            work.thread = None
            del self._running[work]
        return work


def _names(work: Iterable[Computation]) -> str:
    """The handlers with their counts, the most frequent first."""
    counted = Counter(each.name for each in work)
    names = [f"{name} ({number})" for name, number in counted.most_common(MOST_NAMED)]
    more = len(counted) - len(names)
    return ", ".join(names) + (f" and {more} others" if more else "")
