"""SIGTERM and SIGINT drain while an endpoint is served; a second one ends the process."""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable

logger = logging.getLogger("triton_distributed.runtime")

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
        self._draining = False

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
        """Give the signals back."""
        taken, self._taken = self._taken, []
        for each in taken:
            if not self._loop.is_closed():
                self._loop.remove_signal_handler(each)

    def _received(self, number: signal.Signals) -> None:
        if not self._draining:
            self._draining = True
            running = len(self._running())
            logger.info("%s: draining, %d request(s) run; a second signal ends this now", number.name, running)
            self._drain()
            return
        cut = self._running()
        names = ", ".join(cut[:20]) + (", …" if len(cut) > 20 else "")
        print(f"{number.name} again: ending now, {len(cut)} request(s) cut: {names or 'none'}", file=sys.stderr)
        sys.stderr.flush()
        sys.stdout.flush()
        os._exit(128 + number)


def _is_default(handler: object) -> bool:
    if handler in (signal.SIG_DFL, signal.default_int_handler):
        return True
    # asyncio.run puts its own handler on SIGINT, which only cancels the main task.
    return isinstance(handler, functools.partial) and getattr(handler.func, "__module__", "") == "asyncio.runners"
