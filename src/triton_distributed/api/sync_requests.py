"""The requests of a synchronous call that streams them: a plain iterator, read in a thread of its own."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncGenerator, Generator, Iterable, Iterator
from contextvars import Context as Variables
from typing import Any

_END: Any = object()


async def requests_of(source: Iterable[Any], variables: Variables) -> AsyncGenerator[Any]:
    """The items of a plain iterable, for the event loop.

    `next` may wait as long as it likes, so it runs in a daemon thread. It is called once for each request that the call
    asks for. If the call ends early, the thread ends after its current `next`, and closes a generator.

    Args:
        source: the iterable.
        variables: the context variables that it sees.

    Raises:
        Exception: the iterable raised it.
    """
    if isinstance(source, list | tuple):  # They never wait.
        for each in source:
            yield each
        return
    reader = _Reader(source, variables)
    try:
        while (item := await reader.next()) is not _END:
            yield item
            del item
    finally:
        reader.stop()


class _Reader:
    """A thread that calls `next` on request."""

    def __init__(self, source: Iterable[Any], variables: Variables) -> None:
        self._loop = asyncio.get_running_loop()
        self._source: Iterable[Any] | None = source
        self._asked = threading.Semaphore(0)
        self._stopping = False
        self._waiter: asyncio.Future[Any] | None = None
        threading.Thread(
            target=variables.run, args=(self._run,), name="triton-distributed-requests", daemon=True
        ).start()

    async def next(self) -> Any:
        """Return the next item, or `_END`."""
        self._waiter = self._loop.create_future()
        self._asked.release()
        try:
            return await self._waiter
        finally:
            self._waiter = None

    def stop(self) -> None:
        """Let the thread end."""
        self._stopping = True
        self._asked.release()

    def _run(self) -> None:
        source, self._source = self._source, None
        iterator: Iterator[Any] | None = None
        assert source is not None
        while self._asked.acquire() and not self._stopping:
            try:
                if iterator is None:
                    iterator = iter(source)
                item, error = next(iterator, _END), None
            except BaseException as raised:
                item, error = _END, raised
            self._tell(item, error)
            if item is _END:
                return
            del item
        if isinstance(iterator, Generator):
            iterator.close()

    def _tell(self, item: Any, error: BaseException | None) -> None:
        with contextlib.suppress(RuntimeError):  # The loop was closed, so no call waits.
            self._loop.call_soon_threadsafe(self._told, item, error)

    def _told(self, item: Any, error: BaseException | None) -> None:
        waiter = self._waiter
        if waiter is None or waiter.done():
            return
        if error is None:
            waiter.set_result(item)
        elif isinstance(error, Exception) and not isinstance(error, StopIteration):
            waiter.set_exception(error)
        else:
            waiter.set_exception(RuntimeError(f"the iterator of requests raised {type(error).__name__}"))
