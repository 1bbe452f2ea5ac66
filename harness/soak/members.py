"""The workers and clients of a soak: parts of `harness.member`."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any

from harness.load import Load, touch
from harness.member import Member
from harness.oracle import Oracle
from harness.requests import ENDPOINT, PLAIN, Journal, Shape, Work, handler
from harness.soak.kinds import COMING, PLANNED, POLICIES, SERVED, TYPED, Unplanned, coming
from harness.soak.news import News
from harness.waiting import PATIENCE_S, known, patiently
from harness.worker import serve_all
from triton_distributed.errors import RuntimeClosed
from triton_distributed.runtime import Client

MOST_AT_ONCE = 200  # Calls of one client. About 20 are open at the default rate; a stall may add the others.
AT_ONCE = 8  # More than a worker has threads for its handlers.
STEADY = "steady"  # The worker whose endpoints are never paused.


class Churn:
    """An endpoint that comes and goes, and one that is paused and resumed, between `go` and `rest`."""

    def __init__(self, member: Member) -> None:
        self._runtime, self._pauses, self._rng = member.runtime, member.name != STEADY, random.Random(member.name)
        self._going, self._resting = asyncio.Event(), asyncio.Event()
        self._resting.set()
        self._task = asyncio.create_task(self._run())

    async def rest(self) -> None:
        """Wait until both endpoints are as they were in the beginning.

        Raises:
            Exception: the error that ended the changes.
        """
        self._going.clear()
        waiting = asyncio.create_task(self._resting.wait())
        await patiently(asyncio.wait({waiting, self._task}, return_when=asyncio.FIRST_COMPLETED))
        if self._task.done():
            waiting.cancel()
            self._task.result()

    def go(self, rate: float) -> None:
        """Go on."""
        self._going.set()

    async def _run(self) -> None:
        while True:
            await self._going.wait()
            self._resting.clear()
            try:
                await self._round()
            except RuntimeClosed:  # The worker drains.
                return
            finally:
                self._resting.set()
            await asyncio.sleep(self._rng.uniform(0.2, 1.0))

    async def _round(self) -> None:
        serving = self._runtime.endpoint(COMING).serve_endpoint(coming)
        await asyncio.wait({serving}, timeout=self._rng.uniform(0.1, 1.0))
        serving.cancel()
        await asyncio.wait({serving})
        if not serving.cancelled():
            serving.result()
        if self._pauses:
            await self._runtime.endpoint(TYPED).pause()
            await asyncio.sleep(self._rng.uniform(0.1, 0.5))
            await self._runtime.endpoint(TYPED).resume()

    async def close(self) -> None:
        """End it."""
        self._task.cancel()
        await asyncio.wait({self._task})


async def _hears(member: Member) -> News:
    """Let the member receive events."""
    news = News(member.runtime, member.name)
    await news.open()
    member.questions["news"] = news.tally
    member.closing.append(news.close)
    return news


async def work(member: Member, made: Callable[[Journal], Callable[..., Any]] = handler) -> None:
    """The part of a worker.

    Args:
        member: the process.
        made: makes the streaming handler.
    """
    await _hears(member)
    await serve_all(member, made)
    for path, (function, limits) in SERVED.items():
        member.serve(path, function, **limits)
    calls = await member.runtime.endpoint(ENDPOINT).client()
    churn = Churn(member)

    async def connect(ids: list[int]) -> None:
        await known([calls], ids)
        await touch(calls, ids)

    member.questions |= {"go": churn.go, "rest": churn.rest, "touch": connect}
    member.closing.append(churn.close)


async def call(member: Member, seed: str, number: str) -> None:
    """The part of a client."""
    rng = random.Random(f"{seed} {member.name}")
    news = await _hears(member)
    clients = {path: await member.runtime.endpoint(path).client(policy) for path, policy in POLICIES.items()}
    oracle = Oracle(strict=True, longest_s=PATIENCE_S, keeps=False)
    kinds = (*PLANNED, *Unplanned(member, clients, news, rng).kinds())
    load = Load(clients, oracle, kinds, rng, (int(number) + 1) * 10**9, MOST_AT_ONCE)
    lasting = [client for path, client in clients.items() if path != COMING]

    async def quiet(ids: list[int]) -> None:
        """Get everything that an idle process has: a connection to each worker, and all threads."""
        await known(lasting, ids)
        await touch(clients[ENDPOINT], ids)
        await asyncio.gather(*(_thread(clients[PLAIN], each) for each in ids * AT_ONCE))
        await news.publish()

    member.questions |= {"go": load.go, "rest": load.rest, "tally": load.tally, "touch": quiet}
    member.open_calls.append(lambda: load.open_calls)
    member.closing.append(load.close)


async def _thread(client: Client, instance_id: int) -> None:
    """Call a handler that runs in a thread."""
    work = Work(-1, Shape.STREAM, 20, 40)
    found = [item async for item in client.direct(work, instance_id, annotated=False)]
    assert found == [work.item(index) for index in range(20)], found
