"""The event loop as the threads of the status port see it: whether it turns, and what it does if it does not."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, wait
from contextvars import Context
from typing import Any, TypeVar

from triton_distributed.observe.stacks import blame, callback

T = TypeVar("T")

ANSWER_S = 0.5
"""Seconds to wait for the loop when a page needs it. Kubernetes waits one second for a probe's response by default."""

KNOWN_STUCK_S = 0.02
"""Seconds to wait for a loop that has not given a sign for `ANSWER_S`."""


class Stuck(Exception):
    """The event loop did not do in time what it was asked to do, or will not do it."""


class Loop:
    """Watches the event loop of a runtime, and has functions called on it.

    Args:
        loop: the loop.
        thread: the id of its thread.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, thread: int) -> None:
        self._loop, self._thread = loop, thread
        self._asked_at: float | None = None  # When the loop was asked for a sign; None when it has given it.
        self._tasks: set[asyncio.Task[Any]] = set()  # Of coroutines that threads wait for; used on the loop only.
        self._closing = False

    @property
    def is_closed(self) -> bool:
        """Whether the loop cannot run again."""
        return self._loop.is_closed()

    @property
    def stuck_s(self) -> float:
        """Seconds since which the loop owes a sign; 0 if it owes none."""
        asked_at = self._asked_at
        return 0.0 if asked_at is None else time.monotonic() - asked_at

    def ask(self, then: Callable[[float], None]) -> None:
        """Ask the loop for a sign, unless it still owes one.

        Args:
            then: called on the loop with the seconds that the loop took.
        """
        if self._asked_at is not None:
            return
        asked_at = self._asked_at = time.monotonic()

        def sign() -> None:
            self._asked_at = None
            then(time.monotonic() - asked_at)

        self._post(sign)

    def _post(self, function: Callable[[], object]) -> bool:
        with contextlib.suppress(RuntimeError):  # The loop is closed.
            self._loop.call_soon_threadsafe(function)
            return True
        return False

    def call(self, function: Callable[[], T]) -> T:
        """Call a function on the loop and return its result. Its error is raised here.

        Raises:
            Stuck: the loop did not call it in time, and will not call it later; or it has called it, but the call has
                not returned.
        """
        future: Future[T] = Future()

        def run() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function())
                except BaseException as error:
                    future.set_exception(error)

        if not self._post(run):
            raise Stuck("the event loop is closed")
        limit_s = ANSWER_S if self.stuck_s < ANSWER_S else KNOWN_STUCK_S
        done, _ = wait([future], limit_s)
        if not done and (future.cancel() or not wait([future], ANSWER_S).done):
            raise Stuck("the event loop is stuck")
        return future.result()

    def run(self, make: Callable[[], Coroutine[Any, Any, T]], limit_s: float, context: Context) -> T:
        """Run a coroutine on the loop and return its result. Its error is raised here.

        Args:
            make: makes the coroutine; it is called on the loop.
            limit_s: seconds to wait; then the coroutine is cancelled.
            context: the context in which the coroutine runs.

        Raises:
            Stuck: the loop did not begin in time, the coroutine did not end in time, or the runtime closes.
        """
        future: Future[T] = Future()

        def ended(task: asyncio.Task[T]) -> None:
            self._tasks.discard(task)
            if task.cancelled():
                future.set_exception(Stuck("the runtime closes" if self._closing else "it was cancelled"))
            elif (error := task.exception()) is not None:
                future.set_exception(error)
            else:
                future.set_result(task.result())

        def begin() -> asyncio.Task[T]:
            if self._closing:
                raise Stuck("the runtime closes")
            task = self._loop.create_task(make(), context=context)
            self._tasks.add(task)
            task.add_done_callback(ended)
            return task

        task = self.call(begin)
        done, _ = wait([future], limit_s)
        if not done:
            self._post(task.cancel)
            raise Stuck(f"it did not end within {limit_s:g} s")
        return future.result()

    def cancel_all(self) -> None:
        """Cancel the coroutines of `run`, and take no more; called on the loop."""
        self._closing = True
        for task in self._tasks:
            task.cancel()

    def place(self) -> str:
        """The line of code that the loop's thread executes; empty if it waits for events or has ended."""
        frame = sys._current_frames().get(self._thread)
        if frame is None or not (frames := callback(frame, None)):
            return ""
        return str(blame(frames))
