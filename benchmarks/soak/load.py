"""The mixed load of one client: calls of all kinds at a fixed rate, every answer checked, every error counted."""

from __future__ import annotations

import asyncio
import random
import traceback
from collections import Counter

from benchmarks.soak.calls import KINDS, Caller, Kind
from benchmarks.soak.waiting import PATIENCE_S, patiently, until
from triton_distributed.errors import RemoteError, StreamIncomplete

MOST_AT_ONCE = 200  # calls of one client: some 20 are open at the default rate, and a machine that stalls adds no more
BEHIND_S = 0.5  # of the rate that is made up for after a stall
MOST_FAILURES = 20  # that are told


class Load:
    """Starts calls while it goes.

    Args:
        caller: what the calls are made with.
        rate: calls begun a second.

    Attributes:
        outcomes: by kind of call, how many ended how.
        lost: streams that broke, by the instance.
        failures: what must not happen, in words.
    """

    def __init__(self, caller: Caller, rate: float, rng: random.Random, kinds: tuple[Kind, ...] = KINDS) -> None:
        self._caller, self._pause_s, self._rng = caller, 1 / rate, rng
        self._kinds, self._weights = kinds, [each.weight for each in kinds]
        self._going = asyncio.Event()
        self._calls: set[asyncio.Task[None]] = set()  # at most MOST_AT_ONCE
        self.outcomes: dict[str, Counter[str]] = {each.name: Counter() for each in kinds}
        self.lost: Counter[int] = Counter()
        self.failures: list[str] = []
        self._task = asyncio.create_task(self._run())

    def go(self) -> None:
        """Begin calls."""
        self._going.set()

    async def rest(self) -> None:
        """Begin no more, and wait until all have ended.

        Raises:
            TimeoutError: one does not.
        """
        self._going.clear()
        if self._calls:
            await patiently(asyncio.wait(self._calls))
        await until(lambda: self._caller.open_calls == 0, "calls that nobody waits for end")

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        due = loop.time()
        while True:
            await self._going.wait()
            due = max(due + self._pause_s, loop.time() - BEHIND_S)
            await asyncio.sleep(due - loop.time())
            if len(self._calls) >= MOST_AT_ONCE:
                await asyncio.wait(self._calls, return_when=asyncio.FIRST_COMPLETED)
            if self._going.is_set():
                (kind,) = self._rng.choices(self._kinds, self._weights)
                task = loop.create_task(self.one(kind))
                self._calls.add(task)
                task.add_done_callback(self._calls.discard)

    async def one(self, kind: Kind) -> None:
        """One call; how it ended is counted."""
        try:
            async with asyncio.timeout(PATIENCE_S):
                outcome = await kind.work(self._caller) or "ok"
        except Exception as error:
            outcome = error.type_name if isinstance(error, RemoteError) else type(error).__name__
            if not kind.permits(error):
                self._failed(f"{kind.name}: {''.join(traceback.format_exception(error))}")
            elif isinstance(error, StreamIncomplete) and not isinstance(error, RemoteError):
                self.lost[error.instance_id] += 1
        except asyncio.CancelledError as error:
            if self._task.cancelled() or self._task.cancelling():
                raise
            outcome = "CancelledError"
            self._failed(f"{kind.name}: {''.join(traceback.format_exception(error))}")
        self.outcomes[kind.name][outcome] += 1

    def _failed(self, words: str) -> None:
        if len(self.failures) < MOST_FAILURES:
            self.failures.append(words)

    async def close(self) -> None:
        """End what is open."""
        self._task.cancel()
        tasks = {self._task, *self._calls}
        for each in tasks:
            each.cancel()
        await asyncio.wait(tasks)
