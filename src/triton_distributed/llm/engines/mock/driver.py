"""Runs the scheduler in time: one task makes steps while there is work. It only needs the clock of its event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from triton_distributed.llm.engines.mock.kv_events import Event
from triton_distributed.llm.engines.mock.scheduler import Scheduler, Sequence
from triton_distributed.llm.engines.mock.timing import Timing

EMPTY_S = 0.001
"""Seconds until the next step after one that could compute nothing."""


class Driver:
    """Makes steps while sequences wait or run.

    Args:
        scheduler: what it drives.
        timing: how long a step takes.
    """

    def __init__(self, scheduler: Scheduler, timing: Timing) -> None:
        self.scheduler = scheduler
        self._timing = timing
        self._publish: Callable[[float, list[Event]], object] | None = None
        self._task: asyncio.Task[None] | None = None
        self._waiters: dict[Sequence, tuple[int, asyncio.Future[None]]] = {}

    async def reach(self, sequence: Sequence, generated: int) -> None:
        """Wait until a sequence of the scheduler has generated this many tokens, as many as its answer has at most.

        Raises:
            Exception: what the listener raised.
        """
        if sequence.generated >= generated:
            return
        if self._task is None:
            self._task = asyncio.create_task(self._drive(), name="mock engine")
        waiter = asyncio.get_running_loop().create_future()
        self._waiters[sequence] = generated, waiter
        try:
            await waiter
        finally:
            del self._waiters[sequence]

    def listen(self, publish: Callable[[float, list[Event]], object]) -> None:
        """From now on, call `publish` with the cache's events and their time, as the loop's clock tells it."""
        self._publish, self.scheduler.cache.record = publish, True

    def publish(self) -> None:
        """Publish what has happened in the cache."""
        if self._publish is not None and (events := self.scheduler.cache.take_events()):
            self._publish(asyncio.get_running_loop().time(), events)

    async def close(self) -> None:
        """End the task, if it runs."""
        if (task := self._task) is not None:
            task.cancel()
            await asyncio.wait([task])
            self._task = None

    async def _drive(self) -> None:
        try:
            await self._steps()
        except Exception as error:
            # The requests report it, so the task itself need not fail.
            for _, waiter in self._waiters.values():
                if not waiter.done():
                    waiter.set_exception(error)
        finally:
            self._task = None

    async def _steps(self) -> None:
        loop, scheduler = asyncio.get_running_loop(), self.scheduler
        due = loop.time()
        while scheduler.waiting or scheduler.running:
            step = scheduler.step()
            self.publish()
            # From one due time to the next, so that the pauses of a real loop do not add up.
            took_s = EMPTY_S if step.empty else self._timing.step_ms(step, scheduler.cache) / 1000
            due = max(due + took_s, loop.time())
            await asyncio.sleep(due - loop.time())
            scheduler.complete(step)
            self.publish()
            for sequence, (generated, waiter) in self._waiters.items():
                if sequence.generated >= generated and not waiter.done():
                    waiter.set_result(None)
