"""A steady load of one process: calls of several kinds at a fixed rate. No call waits for another."""

from __future__ import annotations

import asyncio
import random
import time
import traceback
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness.caller import make_call
from harness.member import Member
from harness.oracle import Oracle
from harness.requests import ENDPOINT, Plan, Shape, Work
from harness.waiting import PATIENCE_S, known, patiently, until
from triton_distributed.errors import RemoteError
from triton_distributed.runtime import Client

BEHIND_S = 0.5  # Seconds of missed calls that are made later, after a stall.
MOST_FAILURES = 20  # The number of descriptions that are kept. All failures are counted.


@dataclass(frozen=True)
class Kind:
    """A kind of call: either planned and judged by the oracle, or one that judges itself.

    Attributes:
        name: the name under which its calls are counted.
        weight: how often it is drawn, relative to the other kinds.
        plan: draws a call, given randomness and the request's id.
        work: makes a call and returns how it ended, None for well; raises an error that is not allowed.
    """

    name: str
    weight: float
    plan: Callable[[random.Random, int], Plan] | None = None
    work: Callable[[], Awaitable[str | None]] | None = None


class Load:
    """Begins calls at random moments, so that faults do not hit every call at the same place.

    Args:
        clients: the clients by endpoint.
        oracle: judges the planned calls.
        kinds: the kinds to draw from.
        rng: the source of all randomness.
        first_id: the id of the first request; no other process of the run uses the 10⁹ ids from it on.
        at_once: calls that may be under way; further ones wait.

    Attributes:
        outcomes: the counts of ends, by kind of call.
        failures: descriptions of failed calls that judge themselves.
        late_s: the delay of each call's start, which is the lag of the loop.
    """

    def __init__(
        self,
        clients: Mapping[str, Client],
        oracle: Oracle,
        kinds: Sequence[Kind],
        rng: random.Random,
        first_id: int,
        at_once: int = 2000,
    ) -> None:
        self.oracle = oracle
        self._clients, self._kinds, self._rng, self._id, self._at_once = clients, kinds, rng, first_id, at_once
        self._weights = [each.weight for each in kinds]
        self._going = asyncio.Event()
        self._pause_s = 1.0
        self._calls: set[asyncio.Task[None]] = set()  # At most `at_once`.
        self.outcomes: dict[str, Counter[str]] = {each.name: Counter() for each in kinds}
        self.failures: list[str] = []
        self.late_s: list[float] = []
        self._task = asyncio.create_task(self._run())

    def go(self, rate: float) -> None:
        """Begin `rate` calls a second."""
        self._pause_s = 1 / rate
        self._going.set()

    async def rest(self) -> None:
        """Begin no more calls, and wait until all have ended.

        Raises:
            TimeoutError: a call does not end.
        """
        self._going.clear()
        if self._calls:
            await patiently(asyncio.wait(self._calls))
        await until(lambda: self.open_calls == 0, "calls without a reader end")
        if self._task.done():
            self._task.result()

    @property
    def open_calls(self) -> int:
        """The number of calls that have not ended."""
        return sum(each.stats.inflight for each in self._clients.values())

    async def _run(self) -> None:
        while True:
            await self._going.wait()
            begin, number = time.monotonic(), 0
            while self._going.is_set():
                due = begin + (number + self._rng.random()) * self._pause_s
                await asyncio.sleep(due - time.monotonic())
                late = time.monotonic() - due
                if self.oracle.times:  # A long run has not enough memory for them.
                    self.late_s.append(late)
                begin += max(0.0, late - BEHIND_S)
                if len(self._calls) >= self._at_once:
                    await asyncio.wait(self._calls, return_when=asyncio.FIRST_COMPLETED)
                number += 1
                if self._going.is_set():
                    (kind,) = self._rng.choices(self._kinds, self._weights)
                    task = asyncio.create_task(self.one(kind, due))
                    self._calls.add(task)
                    task.add_done_callback(self._calls.discard)

    async def one(self, kind: Kind, due_s: float | None = None) -> None:
        """Make one call and count how it ended."""
        if kind.plan is not None:
            plan = kind.plan(self._rng, self._id)
            self._id += 1
            ticket = await make_call(self._clients[plan.via], plan, self.oracle, time.monotonic, due_s)
            self.outcomes[kind.name][ticket.outcome] += 1
            return
        assert kind.work is not None
        try:
            async with asyncio.timeout(PATIENCE_S):
                outcome = await kind.work() or "answered"
        except (Exception, asyncio.CancelledError) as error:
            if isinstance(error, asyncio.CancelledError) and self._task.cancelling():
                raise
            outcome = error.type_name if isinstance(error, RemoteError) else type(error).__name__
            if len(self.failures) < MOST_FAILURES:
                self.failures.append(f"{kind.name}: {''.join(traceback.format_exception(error))}")
        self.outcomes[kind.name][outcome] += 1

    def tally(self) -> dict[str, Any]:
        """The counts of all calls so far."""
        failures = [*self.failures, *self.oracle.violations[:MOST_FAILURES]]
        return {"outcomes": self.outcomes, "broken": self.oracle.broken, "failures": failures}

    async def close(self) -> None:
        """End the open calls."""
        self._task.cancel()
        tasks = {self._task, *self._calls}
        for each in tasks:
            each.cancel()
        await asyncio.wait(tasks)


def join(member: Member, load: Load, clients: Mapping[str, Client]) -> None:
    """Let a member make this load on request."""

    async def connect(ids: list[int]) -> None:
        await known(list(clients.values()), ids)
        await touch(clients[ENDPOINT], ids)

    member.questions |= {"connect": connect, "go": load.go, "rest": load.rest, "tally": load.tally}
    member.open_calls.append(lambda: load.open_calls)
    member.closing.append(load.close)


async def touch(client: Client, ids: list[int]) -> None:
    """Connect to each of these workers, which serve `requests.handler`.

    Raises:
        AssertionError: a worker gives a wrong answer.
    """
    work = Work(-1, Shape.UNARY, 1)
    for each in ids:
        async for answer in client.direct(work, each, annotated=False):
            assert answer == work.item(0), answer
