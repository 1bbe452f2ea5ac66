"""Handlers written with plain `def`, run in a bounded pool of threads so that the loop never waits for them."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future
from typing import Any, NamedTuple, TypeAlias

from triton_distributed.runtime.context import Context

_Work: TypeAlias = tuple["Future[Any]", contextvars.Context, Callable[..., Any], tuple[Any, ...]]

AHEAD = 64  # items that a generator may be ahead of its consumer before its thread goes back to the pool


class HandlerThreads:
    """The pool: threads are made when first needed, up to a number, and are daemons.

    The standard pool's threads are joined when the interpreter ends, so one handler stuck in C code would keep a
    drained worker alive for ever; these are left behind.

    Args:
        most: threads at most; further work waits for one, and is bounded by `serve_endpoint(max_inflight=)`.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._work: queue.SimpleQueue[_Work | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._idle = threading.Semaphore(0)
        self._closed = False

    def submit(self, work: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Run `work` in a thread, in a copy of the caller's context.

        Raises:
            RuntimeError: the pool was closed.
        """
        if self._closed:
            raise RuntimeError("the runtime was shut down")
        future: Future[Any] = Future()
        self._work.put((future, contextvars.copy_context(), work, arguments))
        if not self._idle.acquire(blocking=False) and len(self._threads) < self._most:
            name = f"trd-handler_{len(self._threads)}"
            thread = threading.Thread(target=self._serve, name=name, daemon=True)
            try:
                thread.start()
            except RuntimeError:  # the system has no more threads: those that there are will come to it
                if not self._threads:
                    future.cancel()
                    raise
            else:
                self._threads.append(thread)
        return future

    def _serve(self) -> None:
        while (each := self._work.get()) is not None:
            future, context, work, arguments = each
            wanted = future.set_running_or_notify_cancel()
            result = error = None
            if wanted:
                try:
                    result = context.run(work, *arguments)
                except BaseException as raised:
                    error = raised
            self._idle.release()  # before anybody knows: who then comes with more finds this thread, and makes no other
            if error is not None:
                future.set_exception(error)
            elif wanted:
                future.set_result(result)
            del each, future, context, work, arguments, result, error  # nothing of a request outlives it here

    async def call(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """Run `work` in a thread and return what it returns.

        Work that waits for a thread is taken back when the caller is cancelled. A thread cannot be interrupted: work
        that has begun ends before this does.
        """
        work_future = self.submit(_guarded, work, *arguments)
        future = asyncio.wrap_future(work_future)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            if not work_future.cancel():
                with contextlib.suppress(Exception):
                    await future
            raise

    def close(self) -> None:
        """Take no more work; threads end when theirs does."""
        self._closed = True
        for _ in self._threads:
            self._work.put(None)


def _guarded(work: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return work(*arguments)
    except StopIteration as error:  # no future can hold one
        raise RuntimeError("the handler raised StopIteration") from error


class _WithToken(NamedTuple):
    token: bytes
    item: Any


class ThreadedIterator:
    """A plain generator as an async iterator.

    A thread runs it until it is `AHEAD` items ahead, then returns to the pool: a consumer that does not read holds no
    thread. Items are handed to the loop one wake-up for however many there are.
    """

    def __init__(self, threads: HandlerThreads, items: Iterator[Any], context: Context | None = None) -> None:
        self._threads = threads
        self._context = context or Context()
        self._iterator = items
        self._loop = asyncio.get_running_loop()
        self._items: deque[Any] = deque()
        self._running = self._done = self._stop = self._notified = False
        self._error: BaseException | None = None
        self._waiter: asyncio.Future[None] | None = None

    def __aiter__(self) -> ThreadedIterator:
        return self

    async def __anext__(self) -> Any:
        while not self._items:
            self._notified = False
            done = self._done  # before the items are looked at again: the thread appends first and is done then
            if self._items:
                break
            if done and self._error is not None:
                raise self._error
            if done:
                raise StopAsyncIteration
            if not self._running:
                self._threads.submit(self._run)
                self._running = True
            await self._wait()
        item = self._items.popleft()
        if item.__class__ is _WithToken:
            self._context.attach_token(item.token)
            return item.item
        return item

    async def aclose(self) -> None:
        """Close the generator, after the step that it is at: a thread cannot be interrupted."""
        self._stop = True
        self._items.clear()
        while self._running:
            await self._wait()
        if not self._done:
            self._threads.submit(self._close)
            self._running = True
            while self._running:
                await self._wait()

    async def _wait(self) -> None:
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    # in a thread

    def _run(self) -> None:
        try:
            while not self._stop and len(self._items) < AHEAD:
                item = next(self._iterator)
                token = self._context.take_token()
                self._items.append(item if token is None else _WithToken(token, item))
                if not self._notified:
                    self._notified = True
                    self._post(self._wake)
        except StopIteration:
            self._done = True
        except StopAsyncIteration as error:  # let through, it would look like a clean end
            self._error = RuntimeError("the handler raised StopAsyncIteration")
            self._error.__cause__ = error
            self._done = True
        except BaseException as error:
            self._error = error
            self._done = True
        finally:
            self._post(self._stepped)

    def _close(self) -> None:
        try:
            if isinstance(self._iterator, Generator):
                self._iterator.close()
        except BaseException as error:
            self._error = error
        finally:
            self._done = True
            self._post(self._stepped)

    def _post(self, callback: Callable[[], None]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop was closed under a thread that could not be stopped
            self._loop.call_soon_threadsafe(callback)

    # on the loop

    def _wake(self) -> None:
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def _stepped(self) -> None:
        self._running = False
        self._wake()
