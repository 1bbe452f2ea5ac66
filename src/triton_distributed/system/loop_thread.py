"""A daemon thread with its own event loop, for work that must continue while the program's loop is busy."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class ThreadEnded(Exception):
    """The thread ended before it had finished the work."""


class LoopThread:
    """Runs one coroutine in a thread, and others on request. The thread starts at once.

    Args:
        main: runs as long as the thread. It gets an event that is set when it must return. Tasks that still run then
            are cancelled.
        name: the thread's name.
    """

    def __init__(self, main: Callable[[asyncio.Event], Coroutine[Any, Any, None]], name: str) -> None:
        self._loop = asyncio.SelectorEventLoop()
        self._stopping = asyncio.Event()
        self._lock = threading.Lock()  # Guards the two attributes below.
        self._ended = False
        self._waiting: dict[asyncio.Future[Any], asyncio.AbstractEventLoop] = {}  # With the loops of the waiting tasks.
        self._thread = threading.Thread(target=self._run, args=(main,), name=name, daemon=True)
        self._thread.start()

    def _run(self, main: Callable[[asyncio.Event], Coroutine[Any, Any, None]]) -> None:
        try:
            with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
                runner.run(main(self._stopping))
        finally:
            with self._lock:
                self._ended = True
                waiting, self._waiting = self._waiting, {}
            for future, loop in waiting.items():
                tell(loop, _fail, future, ThreadEnded())

    def post(self, function: Callable[..., object], *arguments: object) -> None:
        """Call `function` in the thread, after everything posted before. Do nothing if the thread has ended."""
        tell(self._loop, function, *arguments)

    async def call(self, function: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run a coroutine in the thread and return its result. Cancelling the caller cancels the coroutine.

        Raises:
            ThreadEnded: the thread ends or has ended.
        """
        here, done = self._expect()
        running: list[asyncio.Task[T]] = []

        def begin() -> None:
            task = self._loop.create_task(function())
            running.append(task)
            task.add_done_callback(finished)

        def finished(task: asyncio.Task[T]) -> None:
            if task.cancelled():
                tell(here, _fail, done, ThreadEnded())
            elif (error := task.exception()) is not None:
                tell(here, _fail, done, error)
            else:
                tell(here, _succeed, done, task.result())

        def cancel() -> None:
            for task in running:
                task.cancel()

        self.post(begin)
        try:
            result: T = await done
            return result
        except asyncio.CancelledError:
            self.post(cancel)
            raise
        finally:
            with self._lock:
                self._waiting.pop(done, None)

    async def stop(self, patience_s: float) -> None:
        """Let the thread end, and wait at most `patience_s` seconds for that."""
        try:
            _, ended = self._expect()
        except ThreadEnded:
            return
        self.post(self._stopping.set)
        try:
            async with asyncio.timeout(patience_s):
                await ended
        except ThreadEnded:
            self._thread.join(patience_s)  # The thread has nothing left to do.
        except TimeoutError:
            pass  # The thread ends by itself or with the process.

    def _expect(self) -> tuple[asyncio.AbstractEventLoop, asyncio.Future[Any]]:
        """Return a future of the running loop that fails with ThreadEnded if the thread ends first."""
        here = asyncio.get_running_loop()
        future: asyncio.Future[Any] = here.create_future()
        with self._lock:
            if self._ended:
                raise ThreadEnded
            self._waiting[future] = here
        return here, future


def tell(loop: asyncio.AbstractEventLoop, function: Callable[..., object], *arguments: object) -> bool:
    """Call `function` on another thread's loop. Return False and do nothing if that loop is closed."""
    try:
        loop.call_soon_threadsafe(function, *arguments)
    except RuntimeError:
        return False
    return True


def _fail(future: asyncio.Future[Any], error: BaseException) -> None:
    if not future.done():
        future.set_exception(error)


def _succeed(future: asyncio.Future[Any], result: object) -> None:
    if not future.done():
        future.set_result(result)
