"""Drains on SIGTERM or SIGINT while an endpoint is served. A second signal, or the end of the time, ends the process.

The handlers are Python's own (`signal.signal`), not those of the event loop. They run in the main thread between two
bytecodes, so a second signal also ends a process whose loop is stuck in a handler.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import contextvars
import functools
import logging
import os
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

from triton_distributed.system import first_process
from triton_distributed.system.current_line import innermost_line
from triton_distributed.system.fork import watch_forks

logger = logging.getLogger("triton_distributed.runtime")

ECHO_S = 0.02
"""Seconds in which a repeated signal is ignored as the same one: `timeout` and process groups deliver it twice."""

REPEAT_S = 1.0
"""Seconds in which a repeated signal is ignored if no request runs: the program is ending by itself."""

GRACE_S = 3.0
"""Seconds that a signalled process has after the drain's time, if handlers do not end or the loop is stuck.

Handlers have 2 s of this for their clean-up (`serving.endpoint.CUT_S`). With the default drain of 30 s a process ends
after 33 s, before an orchestrator that waits 45 s kills it without a log entry."""

MOST_NAMED = 20
"""The largest number of requests that the last log entry of a process names."""

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class DrainSignals:
    """One runtime's part in the handling of the two signals, which all runtimes of a loop share.

    Args:
        loop: the running loop.
        drain: begins the drain; called once.
        drain_s: seconds that the drain may take.
        running: returns the ids of the requests whose handlers run, when a second signal cuts them.
        stuck: returns the requests whose handlers still run after their cancellation, each with its current line.
        leave: removes what the process must not leave when it ends at once. It is called in any thread, at any point.
        form: makes a line for standard error of a text.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        drain: Callable[[], None],
        drain_s: float,
        running: Callable[[], list[str]],
        stuck: Callable[[], list[str]],
        leave: Callable[[], object],
        form: Callable[[str], str] = str,
    ) -> None:
        self._loop = loop
        self.drain = drain
        self.drain_s = drain_s
        self.running = running
        self.stuck = stuck
        self.leave = leave
        self.form = form

    def install(self) -> None:
        """Handle the signals that still have their default handlers, if this is the main thread."""
        if threading.current_thread() is threading.main_thread():
            _taken.setdefault(self._loop, _Taken(self._loop)).add(self)

    def remove(self) -> None:
        """Leave, because the runtime is closed. The last runtime of a loop restores the signals' handlers."""
        taken = _taken.get(self._loop)
        if taken is not None:
            taken.leave(self)


class _Taken:
    """The signals that the runtimes of one loop handle, and these runtimes."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = weakref.ref(loop)
        self._members: list[DrainSignals] = []
        self._stuck: list[DrainSignals] = []  # Closed members whose handlers did not end.
        self._before: dict[signal.Signals, Any] = {}  # The taken signals with their earlier handlers.
        self._first: float | None = None  # When the first signal came.
        self._form: Callable[[str], str] = str  # That of the newest member.
        self._over = threading.Event()  # Set when every runtime is closed and no handler runs.
        watch_forks(self)

    def add(self, member: DrainSignals) -> None:
        if member in self._members:
            return
        self._members.append(member)
        self._form = member.form
        for each in SIGNALS:
            before = signal.getsignal(each)
            if each not in self._before and _is_default(before):
                with contextlib.suppress(ValueError):  # A subinterpreter has no signals.
                    signal.signal(each, self._received)
                    self._before[each] = before

    def leave(self, member: DrainSignals) -> None:
        """Remove a member. If a signal began the drain, repeated signals are still ignored while the program ends."""
        if member in self._members:
            self._members.remove(member)
            if self._first is not None and member.stuck():
                self._stuck.append(member)
        if self._members:
            return
        if not self._stuck:
            self._over.set()
        taken, self._before = self._before, {}
        for each, before in taken.items():
            if signal.getsignal(each) != self._received:
                continue  # The program has set its own handler.
            if self._first is None:
                signal.signal(each, before)
                continue
            signal.signal(each, self._late)
            # The interpreter restores the default when it ends. A repeated signal would kill it in those milliseconds.
            atexit.register(signal.signal, each, signal.SIG_IGN)

    def forked(self) -> None:
        """Restore the default handlers: a signal to this forked process must not reach the parent's loop."""
        if (loop := self._loop()) is not None:
            _taken.pop(loop, None)
        for each in self._before:
            signal.signal(each, signal.default_int_handler if each == signal.SIGINT else signal.SIG_DFL)

    def _running(self) -> list[str]:
        return [each for member in self._members for each in member.running()]

    def _received(self, number: int, frame: object) -> None:
        """Handle a signal. It may interrupt the main thread at any point."""
        now = time.monotonic()
        if self._first is None:
            self._first = now
            loop = self._loop()
            if loop is not None and not loop.is_closed():
                # In a context of its own: the signal may have interrupted the handler of some request.
                empty = contextvars.Context()
                loop.call_soon_threadsafe(self._drain, signal.Signals(number), context=empty)
                name = f"trd-{signal.Signals(number).name}"
                threading.Thread(target=self._end_in_time, args=(number,), name=name, daemon=True).start()
            return
        running = self._running()
        if now - self._first < ECHO_S or (now - self._first < REPEAT_S and not running):
            return
        names = ", ".join(running[:MOST_NAMED]) + (", …" if len(running) > MOST_NAMED else "")
        self._leave()
        self._end(number, f"again: ending now, {len(running)} request(s) cut: {names or 'none'}")

    def _leave(self) -> None:
        for member in list(self._members):
            with contextlib.suppress(OSError):
                member.leave()

    def _drain(self, number: signal.Signals) -> None:
        """Let every runtime drain. Runs on the loop."""
        count = len(self._running())
        logger.info("%s: draining, %d request(s) running; a second signal ends the process now", number.name, count)
        for member in list(self._members):
            member.drain()

    def _end_in_time(self, number: int) -> None:
        """End the process if handlers do not end, and so the drain does not. Runs in its own thread."""
        limit_s = max(member.drain_s for member in self._members) + GRACE_S
        if self._over.wait(limit_s):
            return
        still = [words for member in (*self._stuck, *self._members) for words in member.stuck()]
        if self._members:
            still.append(f"the main thread stands at {innermost_line(threading.main_thread())}")
        self._leave()
        words = "; ".join(still[:MOST_NAMED]) + ("; …" if len(still) > MOST_NAMED else "")
        self._end(number, f"{limit_s:g} s ago: ending now, although not everything has ended: {words}")

    def _late(self, number: int, frame: object) -> None:
        if self._first is None or time.monotonic() - self._first >= REPEAT_S:
            self._end(number)

    def _end(self, number: int, words: str = "") -> None:
        with contextlib.suppress(Exception):  # The stream may be closed, or in use at this moment.
            if words:
                print(self._form(f"{signal.Signals(number).name} {words}"), file=sys.stderr)
            sys.stderr.flush()
            sys.stdout.flush()
        os._exit(128 + number)


_taken: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Taken] = weakref.WeakKeyDictionary()


def _is_default(handler: object) -> bool:
    if handler in (signal.SIG_DFL, signal.default_int_handler, first_process.end):
        return True
    # asyncio.run puts its own handler on SIGINT, which only cancels the main task.
    return isinstance(handler, functools.partial) and getattr(handler.func, "__module__", "") == "asyncio.runners"
