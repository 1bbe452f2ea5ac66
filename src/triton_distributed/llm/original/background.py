"""Work that goes on while a router is in use, and ends with it or with its runtime."""

from __future__ import annotations

import asyncio
import logging
from asyncio import _get_running_loop as _running_loop
from collections.abc import Callable, Coroutine
from typing import Any

from triton_distributed.llm.contract.errors import RouterClosed
from triton_distributed.system.loop_thread import tell

logger = logging.getLogger("triton_distributed.llm")

Work = Callable[[Callable[[], None]], Coroutine[Any, Any, None]]
"""It calls its argument when it is live."""


class Background:
    """Runs works, all at once. If one fails, the others end, and the next `live` begins all anew.

    Args:
        runtime: the `DistributedRuntime`; its shutdown ends the works.
        works: make the coroutines.
        ended: called when the works have ended.
    """

    def __init__(self, runtime: Any, works: tuple[Work, ...], ended: Callable[[], None] = lambda: None) -> None:
        self._runtime, self._works, self._on_end = runtime, works, ended
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False
        self.error: BaseException | None = None
        self._begin()

    def _begin(self) -> None:
        self._live: asyncio.Future[None] = self._runtime.event_loop().create_future()
        self.error = None
        left = len(self._works)

        def live() -> None:
            nonlocal left
            left -= 1
            if not left and not self._live.done():
                self._live.set_result(None)

        for work in self._works:
            task = self._runtime.spawn(work(live))
            self._tasks.add(task)
            task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if self.error is None:
            self.error = error or RouterClosed()
            if error is not None and not self._runtime.closing:
                logger.warning("a KV router has ended, and begins anew with its next request: %s", error)
        for each in self._tasks:
            each.cancel()
        if not self._tasks:
            if not self._live.done():
                self._live.set_result(None)
            self._on_end()

    async def live(self) -> None:
        """Wait until all works are live.

        Raises:
            RouterClosed: the runtime was shut down, or `close` was called.
            Exception: a work has raised it.
        """
        if self._closed or self._runtime.closing:
            raise RouterClosed()
        if self.error is not None and not self._tasks:
            self._begin()
        await asyncio.shield(self._live)
        self.check()

    def check(self) -> None:
        """Raise the error that ended the works, if they have ended."""
        if self.error is not None:
            raise self.error

    def close(self) -> None:
        """End the works. It may be called in any thread, and twice."""
        self._closed = True
        loop = self._runtime.event_loop()
        if _running_loop() is loop:
            self._cancel()
        else:
            tell(loop, self._cancel)

    def _cancel(self) -> None:
        for each in self._tasks:
            each.cancel()
