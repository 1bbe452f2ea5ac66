"""More calls than the workers have room for, and what becomes of each."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from benchmarks.survival.content import wrong
from benchmarks.survival.load import percentile
from triton_distributed.errors import DeadlineExceeded, Overloaded
from triton_distributed.names import Instance
from triton_distributed.runtime import Client

MOST_WORDS = 5


class Flood:
    """Calls of one client process to the endpoint that has a limit.

    Args:
        busy: its handlers compute; else they wait.
    """

    def __init__(self, client: Client, name: str, busy: bool) -> None:
        self._client, self._name, self._busy = client, name, busy
        self._number = 0

    def _request(self) -> dict[str, Any]:
        self._number += 1
        return {"key": f"{self._name}-flood-{self._number}", "busy": self._busy}

    async def saturate(self, callers: int, seconds: float) -> float:
        """Answers a second, after a quarter of the time that is not counted."""
        begin = time.monotonic() + seconds / 4
        end = begin + seconds
        counted = 0

        async def call(place: int) -> None:
            # Each keeps to one worker: spread at random, some would run out of work while others have too much.
            def policy(request: Any, instances: tuple[Instance, ...], load: Any) -> Instance:
                return instances[place % len(instances)]

            nonlocal counted
            while (now := time.monotonic()) < end:
                try:
                    await self._client.call(self._request(), policy=policy)
                except Overloaded as error:
                    await asyncio.sleep(error.retry_after_s)
                    continue
                counted += begin <= now and time.monotonic() < end

        await asyncio.gather(*(call(place) for place in range(callers)))
        return counted / seconds

    async def phases(self, phases: list[tuple[float, float]], timeout_s: float) -> list[dict[str, Any]]:
        """So many calls a second for so many seconds each; no call waits for another."""
        taken = []
        begin = time.monotonic()
        for rate, seconds in phases:
            phase = Phase(begin, seconds, timeout_s)
            taken.append(phase)
            await phase.run(self._client, self._request, rate)
            begin += seconds
        return [await each.report() for each in taken]


class Phase:
    """Calls at one rate.

    Args:
        begin: when it begins, on the monotonic clock.
        seconds: that it lasts.
        timeout_s: of each call.
    """

    def __init__(self, begin: float, seconds: float, timeout_s: float) -> None:
        self._begin, self._end, self._timeout_s = begin, begin + seconds, timeout_s
        self._rows: list[tuple[float, float | None]] = []  # when due, and how long it took where it was answered
        self._good = self._expired = self._refused = self._tried = 0
        self._hints: list[float] = []
        self._took: list[float] = []
        self._late: list[float] = []
        self._words: list[str] = []
        self._failed = 0
        self._running: set[asyncio.Task[None]] = set()

    async def run(self, client: Client, request: Any, rate: float) -> None:
        number = 0
        while (due := self._begin + number / rate) < self._end:
            if (wait_s := due - time.monotonic()) > 0:
                await asyncio.sleep(wait_s)
            elif number % 20 == 0:
                await asyncio.sleep(0)  # behind the schedule: answers must be read all the same
            self._late.append(time.monotonic() - due)
            task = asyncio.ensure_future(self._one(client, request(), due))
            self._running.add(task)
            task.add_done_callback(self._running.discard)
            number += 1

    async def _one(self, client: Client, request: dict[str, Any], due: float) -> None:
        begin, took = time.monotonic(), None
        try:
            found = await client.call(request, timeout=self._timeout_s)
            took = time.monotonic() - begin
            if words := wrong(request["key"], [found]):
                self._fail(words)
            self._took.append(took)
            self._good += took <= self._timeout_s and begin + took < self._end
        except Overloaded as error:
            self._refused += 1
            self._tried += error.attempts
            if error.retry_after_s:
                self._hints.append(error.retry_after_s)
        except DeadlineExceeded:
            self._expired += 1
            self._took.append(time.monotonic() - begin)
        except Exception as error:
            self._fail(f"{type(error).__name__}: {error}")
        self._rows.append((due, took))

    def _fail(self, words: str) -> None:
        self._failed += 1
        if len(self._words) < MOST_WORDS:
            self._words.append(words)

    async def report(self) -> dict[str, Any]:
        """What became of the calls; waits for the last of them."""
        if self._running:
            await asyncio.wait(self._running)
        answered = len(self._took)
        return {
            "calls": len(self._rows),
            "good": self._good,
            "admitted": answered,
            "expired": self._expired,
            "refused": self._refused,
            "failed": self._failed,
            "words": self._words,
            "tried": self._tried,
            "hints": len(self._hints),
            "hint_p50_s": percentile(self._hints, 0.5),
            "p50_s": percentile(self._took, 0.5),
            "p99_s": percentile(self._took, 0.99),
            "late_p99_s": percentile(self._late, 0.99),
            "windows": self._windows(),
        }

    def _windows(self) -> list[tuple[float, int, int, float]]:
        """Of every 50 ms: when it began, calls that were due in it, those not answered, the median of how long."""
        found: dict[int, list[float | None]] = {}
        for due, took in self._rows:
            found.setdefault(int((due - self._begin) / 0.05), []).append(took)
        windows = []
        for number, each in sorted(found.items()):
            answered = [took for took in each if took is not None]
            windows.append(
                (self._begin + number * 0.05, len(each), len(each) - len(answered), percentile(answered, 0.5))
            )
        return windows
