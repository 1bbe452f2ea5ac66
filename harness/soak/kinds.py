"""The kinds of calls of the soak: planned ones, which the oracle judges, and ones that judge themselves."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from harness.load import Kind
from harness.member import Member
from harness.requests import ENDPOINT, PLAIN, RELAY, TWO_WAY, Leave, Plan, Shape, Work
from harness.soak.news import PASSING, SUBJECT, News, tell
from harness.waiting import patiently, until
from triton_distributed.config import KIB, MIB, Config
from triton_distributed.errors import (
    ConnectionFailed,
    Draining,
    InvalidRequest,
    NoInstances,
    Overloaded,
    Paused,
    StreamIncomplete,
)
from triton_distributed.runtime import Client, DistributedRuntime

# The endpoints that only the soak has, and the policy of each endpoint's client.
ARRAYS, TYPED, NARROW, COMING = (f"chaos.worker.{name}" for name in ("arrays", "typed", "narrow", "coming"))
POLICIES = {
    ENDPOINT: "p2c", TWO_WAY: "round_robin", PLAIN: "random", RELAY: "least_loaded", ARRAYS: "least_loaded",
    TYPED: "round_robin", NARROW: "random", COMING: "round_robin",
}  # fmt: skip
MOST_ITEMS = 500
PAUSED, PAUSE_S = 100, 0.01  # The items of a slow stream, and the seconds between two items.
CROWD = 60  # Calls at once to an endpoint of which three workers run 2 each and queue 4.
PRIORITIES = (-128, -1, 0, 1, 127)  # Only a few: a worker remembers the errors of its estimates for each one.
# The errors of a call that cannot go elsewhere, or whose endpoint disappears.
GONE = (StreamIncomplete, ConnectionFailed, Draining, Paused)


class WrongAnswer(Exception):
    """An answer does not fit its request."""


def same(found: object, wanted: object) -> None:
    """Raise WrongAnswer if two values differ."""
    if found != wanted:
        raise WrongAnswer(f"{found!r:.300} instead of {wanted!r:.300}")


# --- The workers' handlers besides those of `requests` ---------------------------------------------------------------


@dataclass
class Point:
    """A request whose fields are checked."""

    x: int
    y: int


async def arrays(request: dict[str, Any]) -> AsyncIterator[Any]:
    for turn in range(request["times"]):
        yield {"turn": turn, "array": request["array"] ^ turn}


async def typed(request: Point) -> int:
    return request.x * request.y


async def narrow(request: int) -> int:
    await asyncio.sleep(0.005)
    return request


async def coming(request: Any) -> Any:
    """The handler of an endpoint that comes and goes while its worker stays."""
    return request


SERVED: dict[str, tuple[Callable[..., Any], dict[str, int]]] = {
    ARRAYS: (arrays, {}),
    TYPED: (typed, {}),
    NARROW: (narrow, {"max_inflight": 2, "max_queue": 4}),
}


# --- Planned calls ---------------------------------------------------------------------------------------------------


def _size(rng: random.Random) -> int:
    return rng.choice((8, 40, 200, 2_000))


def _unary(rng: random.Random, id: int, **options: Any) -> Plan:
    work = Work(id, Shape.UNARY, 1, _size(rng), wait_s=options.pop("wait_s", 0.0))
    return Plan(work, priority=rng.choice(PRIORITIES), **options)


def _stream(rng: random.Random, id: int, most: int = MOST_ITEMS, pause_s: float = 0.0, **options: Any) -> Plan:
    shape = options.pop("shape", Shape.STREAM)
    return Plan(Work(id, shape, rng.randint(1, most), _size(rng), pause_s), **options)


def _two_way(rng: random.Random, id: int) -> Plan:
    return _stream(rng, id, 100, rng.choice((0.0, 0.001)), shape=Shape.TWO_WAY, via=TWO_WAY)


def _too_late(rng: random.Random, id: int) -> Plan:
    return Plan(Work(id, Shape.STREAM, PAUSED, 40, PAUSE_S), timeout_s=rng.uniform(0.002, 0.15))


def _cancelled(rng: random.Random, id: int) -> Plan:
    """A call that its caller leaves: unsent, unread, before or after its first item, by its task or its context."""
    via = rng.choice((ENDPOINT, RELAY, PLAIN))
    items, pause_s = (MOST_ITEMS, 0.0) if via == PLAIN else rng.choice(((MOST_ITEMS, 0.0), (PAUSED, PAUSE_S)))
    after = rng.randrange(1, items - 1)
    leaving: dict[str, Any] = rng.choice(
        (
            {"leaves_by": Leave.CANCEL},
            {"leaves_by": Leave.DROP},
            {"leaves_after": 0},
            {"leaves_after": after},
            {"cancel_after_s": rng.uniform(0, 0.05)},
            {"leaves_by": Leave.KILL, "leaves_after": after},
        )
    )
    return Plan(Work(id, Shape.STREAM, items, 40, pause_s), via=via, **leaving)


def _two_way_left(rng: random.Random, id: int) -> Plan:
    return Plan(Work(id, Shape.TWO_WAY, PAUSED, 20, PAUSE_S), via=TWO_WAY, leaves_after=rng.randrange(1, 50))


PLANNED = (
    Kind("unary", 20, _unary),
    Kind("streamed", 12, _stream),
    Kind("threaded", 4, lambda rng, id: _stream(rng, id, 200, via=PLAIN)),
    Kind("two_way", 5, _two_way),
    Kind("relayed", 4, lambda rng, id: _stream(rng, id, 100, via=RELAY)),
    Kind("resumed", 4, lambda rng, id: _stream(rng, id, PAUSED, PAUSE_S, shape=Shape.CHECKPOINTED)),
    Kind("idempotent", 4, lambda rng, id: _unary(rng, id, idempotent=True, wait_s=rng.choice((0.0, 0.01, 0.2)))),
    Kind(
        "hedged",
        4,
        lambda rng, id: _unary(rng, id, idempotent=True, hedge_after_s=0.01, wait_s=rng.choice((0.0, 0.05))),
    ),
    Kind("direct", 5, lambda rng, id: _unary(rng, id, directly=True)),
    Kind("slow_reader", 1, lambda rng, id: Plan(Work(id, Shape.STREAM, rng.randint(1, 200), 8 * KIB), reads_s=0.0025)),
    Kind("failing", 6, lambda rng, id: _stream(rng, id, 6, shape=Shape.ERROR)),
    Kind("too_late", 4, _too_late),
    Kind("cancelled", 10, _cancelled),
    Kind("two_way_left", 2, _two_way_left),
)


# --- Calls that judge themselves -------------------------------------------------------------------------------------


class Unplanned:
    """Calls of one client process that no plan describes."""

    def __init__(self, member: Member, clients: dict[str, Client], news: News, rng: random.Random) -> None:
        self._member, self._clients, self._news, self._rng = member, clients, news, rng

    def kinds(self) -> tuple[Kind, ...]:
        """All of them."""
        return (
            Kind("arrays", 8, work=self.arrays),
            Kind("news", 6, work=self._news.publish),
            Kind("newcomer", 1, work=self.newcomer),
            Kind("passing", 0.5, work=self.passing),
            Kind("typed", 2, work=self.typed),
            Kind("narrow", 0.5, work=self.narrow),
            Kind("coming", 4, work=self.coming),
        )

    async def arrays(self) -> str | None:
        """Send arrays both ways, half of them between 1 and 2 KiB, the others between 512 KiB and 1 MiB."""
        rng = self._rng
        array = np.resize(np.frombuffer(rng.randbytes(256), np.uint8), int(KIB * (MIB // KIB) ** rng.random()))
        turn, times = 0, rng.randint(1, 3)
        try:
            async for item in self._clients[ARRAYS].generate({"times": times, "array": array}, annotated=False):
                same(item["turn"], turn)
                if not np.array_equal(item["array"], array ^ turn):
                    raise WrongAnswer(f"array {turn} of {array.size} bytes differs")
                turn += 1
        except StreamIncomplete:
            return "StreamIncomplete"
        same(turn, times)
        return None

    async def newcomer(self) -> str | None:
        """Make one more client of an endpoint that already has clients."""
        client = await self._member.runtime.endpoint(TYPED).client(self._rng.choice(("p2c", "random")))
        return await self._product(client)

    async def typed(self) -> str | None:
        """Send a request that fits its type, or one that does not."""
        if self._rng.random() < 0.5:
            return await self._product(self._clients[TYPED])
        try:
            await self._clients[TYPED].call({"x": 1, "y": "two"})
        except (InvalidRequest, StreamIncomplete) as error:
            return type(error).__name__
        raise WrongAnswer("a request that does not fit was served")

    async def _product(self, client: Client) -> str | None:
        x, y = self._rng.randrange(1000), self._rng.randrange(1000)
        try:
            same(await client.call(Point(x, y)), x * y)
        except StreamIncomplete:
            return "StreamIncomplete"
        return None

    async def narrow(self) -> str:
        """Send many calls to an endpoint that takes few at once: each is served, or refused with `Overloaded`."""
        outcomes = await asyncio.gather(*(self._narrow(n) for n in range(CROWD)))
        if "answered" not in outcomes:
            raise WrongAnswer("no call of a crowd was served")
        return "some refused" if "Overloaded" in outcomes else "all served"

    async def _narrow(self, n: int) -> str:
        try:
            same(await self._clients[NARROW].call(n, priority=self._rng.choice(PRIORITIES)), n)
        except (Overloaded, StreamIncomplete) as error:
            return type(error).__name__
        return "answered"

    async def coming(self) -> str | None:
        """Call an endpoint that comes and goes."""
        n = self._rng.randrange(1 << 32)
        try:
            same(await self._clients[COMING].call(n), n)
        except (NoInstances, *GONE) as error:
            return type(error).__name__
        return None

    async def passing(self) -> None:
        """Make two runtimes for one call: one serves an endpoint, and the other calls it and receives an event."""
        config = Config.from_env(handle_signals=False)
        path, n = f"soak.{PASSING}.{self._member.name}", self._rng.randrange(1 << 32)
        async with DistributedRuntime(config=config) as here, DistributedRuntime(config=config) as there:
            serving = here.endpoint(path).serve_endpoint(coming)
            client = await there.endpoint(path).client()
            await until(lambda: here.instance_id in client.instance_ids(), "the endpoint of a new runtime is seen")
            same(await client.direct(n, here.instance_id, annotated=False).__anext__(), n)
            subscription = await there.namespace("soak").component("work").subscribe(SUBJECT)
            await tell(here, PASSING, n)
            async for event in subscription:
                if event.data["by"] == PASSING and event.data["n"] == n:
                    break
        await patiently(serving)
