"""The event loop on which a process runs its synchronous calls, in a daemon thread."""

from __future__ import annotations

import _thread
import asyncio
import builtins
import contextlib
import inspect
import threading
from asyncio import _get_running_loop as _running_loop  # A C function, also under uvloop; public except in name.
from collections import deque
from collections.abc import Callable, Coroutine
from contextvars import Context as Variables
from contextvars import copy_context
from threading import get_ident
from typing import Any

from triton_distributed.errors import ForkError, RuntimeClosed
from triton_distributed.system.event_loop import new_event_loop
from triton_distributed.system.fork import watch_forks

_inherited: list[SyncLoop] = []
"""Loops of parent processes. They are kept, because a loop that is dropped changes the epoll object of its process."""


class SyncLoop:
    """An event loop in a daemon thread. Other threads run work on it and wait. The thread starts at once.

    Attributes:
        inherited: this process was forked from the one that made the loop. The thread does not exist here.
    """

    def __init__(self) -> None:
        if not inspect.isbuiltin(_thread.start_new_thread):
            raise RuntimeError(
                "connect_sync() needs threads of the operating system, and gevent or eventlet has replaced them: use "
                "workers with threads, for example gunicorn's `gthread`"
            )
        self.inherited = False
        self._loop = new_event_loop()
        self._posted: deque[Callable[[], object]] = deque()
        self._ended = False  # No further work begins.
        self._stopping = asyncio.Event()
        self._empty = copy_context()  # Posted functions do not see the variables of the thread that posts.
        self._thread = threading.Thread(target=self._run, name="triton-distributed-sync", daemon=True)
        watch_forks(self)
        try:
            self._thread.start()
        except BaseException:  # An interrupt while the thread began.
            self.post(self._stopping.set)
            raise

    def forked(self) -> None:
        """Leave the loop to the parent process."""
        self.inherited = True
        _inherited.append(self)

    # Methods for other threads.

    def run(self, operation: str, work: Callable[[], Any], variables: Variables | None = None) -> Any:
        """Run `work` on the loop, wait for its result and return it. An interrupt of this thread cancels the work.

        Args:
            operation: what the caller does, for error texts.
            work: a function; if it returns a coroutine, that runs in a task.
            variables: the context in which `work` runs; by default a copy of this thread's.

        Raises:
            ForkError: the loop belongs to the parent process.
            RuntimeError: an event loop runs in this thread; see `check_thread`.
            RuntimeClosed: the loop was stopped.
            BaseException: `work` raised it.
        """
        if self.inherited:
            raise ForkError()
        if _running_loop() is not None:
            check_thread(operation, self.thread)
        return self.run_blocking(operation, work, variables)

    def run_blocking(
        self, operation: str, work: Callable[[], Any], variables: Variables | None = None, patience_s: float = -1
    ) -> Any:
        """As `run`, in any thread except the loop's own.

        Args:
            patience_s: seconds after which this returns None and the work goes on; -1 for no limit.
        """
        job = _Job(operation, work, variables or copy_context(), self._loop)
        try:
            self.post(job)
            # A lock is a fast way to wait, and signals interrupt it. See benchmarks/sync_client.py.
            if not job.done.acquire(True, patience_s):
                return None
        except BaseException:
            self.post(job.cancel)
            raise
        return job.outcome()

    def post(self, function: Callable[[], object]) -> None:
        """Call `function` on the loop soon, and do not wait. After the loop's end nothing is called."""
        if self.inherited:
            return
        self._posted.append(function)
        if self._ended:
            self._refuse_posted()
        else:
            # An interrupt may come between any two lines. So nothing here notes that the loop was woken.
            with contextlib.suppress(RuntimeError):  # The loop was closed at this moment, and its thread refuses.
                self._loop.call_soon_threadsafe(self._take, context=self._empty)

    @property
    def thread(self) -> int | None:
        """The identifier of the loop's thread."""
        return self._thread.ident

    def stop(self, patience_s: float | None = None) -> None:
        """End the thread and wait for that. Work that still runs is cancelled.

        Args:
            patience_s: the most seconds to wait; None for no limit.
        """
        if not self.inherited:
            self.post(self._stopping.set)
            self._thread.join(patience_s)

    # Methods for the loop's thread.

    def _take(self) -> None:
        posted = self._posted
        while posted:
            function = posted.popleft()
            try:
                function()
            except Exception as error:  # The other functions run all the same.
                words = f"{function!r} failed on the loop of synchronous calls"
                self._loop.call_exception_handler({"message": words, "exception": error})

    def _refuse_posted(self) -> None:
        """Fail the jobs that were posted after the loop's end. Runs in any thread, and in several at once."""
        with contextlib.suppress(IndexError):
            while True:
                posted = self._posted.popleft()
                if isinstance(posted, _Job):
                    posted.refuse()

    def _run(self) -> None:
        try:
            with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
                runner.run(self._main())
        finally:
            self._ended = True
            self._refuse_posted()

    async def _main(self) -> None:
        await self._stopping.wait()
        self._ended = True
        await asyncio.sleep(0)  # A task that is cancelled before its first step could not tell its waiting thread.


def check_thread(operation: str, loop_thread: int | None = None) -> None:
    """Raise if this thread must not wait, because an event loop runs in it.

    A notebook runs its cells within an event loop, and a cell may wait.

    Args:
        operation: what the caller does.
        loop_thread: the identifier of the thread that would run it.

    Raises:
        RuntimeError: the thread must not wait.
    """
    if _running_loop() is None or (get_ident() != loop_thread and hasattr(builtins, "__IPYTHON__")):
        return
    raise RuntimeError(
        f"{operation}(): an event loop runs in this thread, and a synchronous call would block it: use the "
        f"asynchronous client there (`async with trd.connect() as here`, `await here.{operation}(…)`), or make the "
        "call in another thread: `await asyncio.to_thread(…)`"
    )


class _Job:
    """Work on the loop for which a thread waits."""

    __slots__ = ("_error", "_loop", "_operation", "_result", "_task", "_variables", "_work", "done")

    def __init__(
        self, operation: str, work: Callable[[], Any], variables: Variables, loop: asyncio.AbstractEventLoop
    ) -> None:
        self._operation = operation
        self._work: Callable[[], Any] | None = work
        self._variables = variables
        self._loop = loop
        self._task: asyncio.Task[None] | None = None
        self._result: Any = None
        self._error: BaseException | None = None
        self.done = threading.Lock()
        self.done.acquire()

    def __call__(self) -> None:
        work, self._work = self._work, None
        if work is None:  # The thread was interrupted before.
            return
        try:
            result = self._variables.run(work)
            if isinstance(result, Coroutine):  # A compiled one is of no type in `types`.
                self._task = self._loop.create_task(self._drive(result), context=self._variables)
                return
            self._result = result
        except BaseException as error:
            self._error = error
        self.done.release()

    def refuse(self) -> None:
        self._error = RuntimeClosed(self._operation)
        self.done.release()

    async def _drive(self, work: Coroutine[Any, Any, Any]) -> None:
        try:
            self._result = await work
        except BaseException as error:
            self._error = error
        self._task = None
        self.done.release()

    def cancel(self) -> None:
        self._work = None
        if self._task is not None:
            self._loop.call_soon(self._task.cancel)  # After its first step, without which it could not tell its end.

    def outcome(self) -> Any:
        """The result; the error is raised."""
        error, self._error = self._error, None
        if error is None:
            return self._result
        try:
            raise error
        finally:
            del error  # The error's frames refer to this one.
