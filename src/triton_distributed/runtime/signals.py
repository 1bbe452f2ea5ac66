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
from collections.abc import Callable

logger = logging.getLogger("triton_distributed.runtime")

ECHO_S = 0.02  # `timeout` and process groups deliver one signal twice; nobody presses a key again that soon
REPEAT_S = 1.0  # where nothing is left to cut, a repeat within this finds a program that is ending by itself
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class DrainSignals:
    """Takes the two signals over where nobody else has.

    Args:
        loop: the running loop.
        drain: begins the drain; called once.
        running: the ids of the requests whose handlers run, asked when a second signal cuts them.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, drain: Callable[[], None], running: Callable[[], list[str]]
    ) -> None:
        self._loop = loop
        self._drain = drain
        self._running = running
        self._taken: list[signal.Signals] = []
        self._first: float | None = None  # when the drain was asked for

    def install(self) -> None:
        """Take over those signals that still have their default handlers, if this is the main thread."""
        if self._taken or threading.current_thread() is not threading.main_thread():
            return
        for each in SIGNALS:
            if _is_default(signal.getsignal(each)):
                try:
                    self._loop.add_signal_handler(each, self._received, each)
                except (NotImplementedError, RuntimeError, ValueError):
                    return  # this loop knows no signals
                self._taken.append(each)

    def remove(self) -> None:
        """Give the signals back; where one began the drain, repeats of it still end nothing while the program ends."""
        taken, self._taken = self._taken, []
        for each in taken:
            if self._loop.is_closed():
                continue
            self._loop.remove_signal_handler(each)
            if self._first is not None:
                signal.signal(each, self._late)
                # The interpreter puts the default back when it ends, and a repeat in those milliseconds would kill it.
                atexit.register(signal.signal, each, signal.SIG_IGN)

    def _received(self, number: signal.Signals) -> None:
        now = time.monotonic()
        running = self._running()
        if self._first is None:
            self._first = now
            logger.info("%s: draining, %d request(s) running; a second signal ends this now", number.name, len(running))
            self._drain()
        elif now - self._first < REPEAT_S and (not running or now - self._first < ECHO_S):
            return
        else:
            names = ", ".join(running[:20]) + (", …" if len(running) > 20 else "")
            print(f"{number.name} again: ending now, {len(running)} request(s) cut: {names or 'none'}", file=sys.stderr)
            _end(number)

    def _late(self, number: int, frame: object) -> None:
        if self._first is None or time.monotonic() - self._first >= REPEAT_S:
            _end(number)


def _end(number: int) -> None:
    sys.stderr.flush()
    sys.stdout.flush()
    os._exit(128 + number)


def _is_default(handler: object) -> bool:
    if handler in (signal.SIG_DFL, signal.default_int_handler):
        return True
    # asyncio.run puts its own handler on SIGINT, which only cancels the main task.
    return isinstance(handler, functools.partial) and getattr(handler.func, "__module__", "") == "asyncio.runners"
