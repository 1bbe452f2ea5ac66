"""SIGTERM and SIGINT drain while an endpoint is served; a second one ends the process."""

from __future__ import annotations

import asyncio
import atexit
import functools
import logging
import os
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable

from triton_distributed.external import first_process

logger = logging.getLogger("triton_distributed.runtime")

ECHO_S = 0.02  # `timeout` and process groups deliver one signal twice; nobody presses a key again that soon
REPEAT_S = 1.0  # where nothing is left to cut, a repeat within this finds a program that is ending by itself
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class DrainSignals:
    """One runtime's part in the two signals, which all runtimes of a loop share.

    Args:
        loop: the running loop.
        drain: begins the drain; called once.
        running: the ids of the requests whose handlers run, asked when a second signal cuts them.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, drain: Callable[[], None], running: Callable[[], list[str]]
    ) -> None:
        self._loop = loop
        self.drain = drain
        self.running = running

    def install(self) -> None:
        """Take over those signals that still have their default handlers, if this is the main thread."""
        if threading.current_thread() is threading.main_thread():
            _taken.setdefault(self._loop, _Taken(self._loop)).add(self)

    def remove(self) -> None:
        """Have no more part; the last of a loop gives the signals back."""
        taken = _taken.get(self._loop)
        if taken is not None:
            taken.leave(self)

    def forked(self) -> None:
        """This process is a fork: a signal to it is its own, and must not be passed to the parent's loop."""
        taken = _taken.pop(self._loop, None)
        if taken is not None:
            taken.forked()


class _Taken:
    """The signals that one loop has taken, and the runtimes that drain by them."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = weakref.ref(loop)
        self._members: list[DrainSignals] = []
        self._before: dict[signal.Signals, object] = {}  # the signals that are taken, and the handler each had
        self._first: float | None = None  # when the drain was asked for

    def add(self, member: DrainSignals) -> None:
        if member in self._members:
            return
        self._members.append(member)
        loop = self._loop()
        for each in SIGNALS:
            before = signal.getsignal(each)
            if loop is not None and each not in self._before and _is_default(before):
                try:
                    loop.add_signal_handler(each, self._received, each)
                except (NotImplementedError, RuntimeError, ValueError):
                    return  # this loop knows no signals
                self._before[each] = before

    def leave(self, member: DrainSignals) -> None:
        """Where a signal began the drain, repeats of it still end nothing while the program ends."""
        if member in self._members:
            self._members.remove(member)
        if self._members:
            return
        taken, self._before = self._before, {}
        loop = self._loop()
        for each, before in taken.items():
            if loop is None or loop.is_closed():
                continue
            loop.remove_signal_handler(each)
            if before is first_process.end:
                signal.signal(each, first_process.end)
            if self._first is not None:
                signal.signal(each, self._late)
                # The interpreter puts the default back when it ends, and a repeat in those milliseconds would kill it.
                atexit.register(signal.signal, each, signal.SIG_IGN)

    def forked(self) -> None:
        if self._before:
            signal.set_wakeup_fd(-1)  # it is the parent's loop that would be woken
        for each in self._before:
            signal.signal(each, signal.default_int_handler if each == signal.SIGINT else signal.SIG_DFL)

    def _running(self) -> list[str]:
        return [each for member in self._members for each in member.running()]

    def _received(self, number: signal.Signals) -> None:
        now = time.monotonic()
        running = self._running()
        if self._first is None:
            self._first = now
            logger.info("%s: draining, %d request(s) running; a second signal ends this now", number.name, len(running))
            for member in list(self._members):
                member.drain()
        elif now - self._first < REPEAT_S and (not running or now - self._first < ECHO_S):
            return
        else:
            names = ", ".join(running[:20]) + (", …" if len(running) > 20 else "")
            print(f"{number.name} again: ending now, {len(running)} request(s) cut: {names or 'none'}", file=sys.stderr)
            _end(number)

    def _late(self, number: int, frame: object) -> None:
        if self._first is None or time.monotonic() - self._first >= REPEAT_S:
            _end(number)


_taken: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Taken] = weakref.WeakKeyDictionary()


def _end(number: int) -> None:
    sys.stderr.flush()
    sys.stdout.flush()
    os._exit(128 + number)


def _is_default(handler: object) -> bool:
    if handler in (signal.SIG_DFL, signal.default_int_handler, first_process.end):
        return True
    # asyncio.run puts its own handler on SIGINT, which only cancels the main task.
    return isinstance(handler, functools.partial) and getattr(handler.func, "__module__", "") == "asyncio.runners"
