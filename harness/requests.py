"""The requests of a chaos run and the handler that answers them: every item follows from its request alone."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

import msgspec

from triton_distributed.runtime import Client

# What workers serve: `handler`, `echo`, `plain` and `relay`.
ENDPOINT, TWO_WAY = "chaos.worker.answer", "chaos.worker.echo"
PLAIN, RELAY = "chaos.worker.plain", "chaos.worker.relay"


class Shape(StrEnum):
    """What a request asks of the handler."""

    UNARY = "unary"
    """One item."""
    STREAM = "stream"
    """Several items."""
    CHECKPOINTED = "checkpointed"
    """Several items, with a resume token at each third; called with `resume=True`."""
    ERROR = "error"
    """Several items, then a `LookupError`."""
    TWO_WAY = "two-way"
    """The caller streams as many requests as it wants items, to the handler of `echo`."""


class Work(msgspec.Struct, frozen=True):
    """What travels to the handler.

    Attributes:
        id: of the request, unique in a run.
        shape: what to do.
        items: how many items.
        size: bytes of filling in each.
        pause_s: seconds between items.
        part: which of the requests it is, where the caller streams them.
        wait_s: seconds before the first item.
    """

    id: int
    shape: str
    items: int
    size: int = 0
    pause_s: float = 0.0
    part: int = 0
    wait_s: float = 0.0

    def item(self, index: int) -> list[Any]:
        """Return item number `index`: the request's id, the index, and filling that no other item has."""
        return [self.id, index, filling(self.id, index, self.size)]


class Leave(StrEnum):
    """How a caller leaves a call."""

    BREAK = "break"
    """It stops reading after `Plan.leaves_after` items; where that is 0, it closes the stream before the first."""
    CANCEL = "cancel"
    """It cancels the call before the request has left."""
    DROP = "drop"
    """It drops the call and never looks at it."""
    KILL = "kill"
    """It kills the context after `Plan.leaves_after` items."""


@dataclass(frozen=True, slots=True)
class Plan:
    """One call: what is asked for, and how.

    Attributes:
        work: the request.
        at_s: seconds after the beginning at which it is made.
        idempotent: a second instance may be asked while nothing was answered.
        timeout_s: seconds that it may take; None for as long as it takes.
        leaves_after: items after which the caller stops reading; None where it reads to the end.
        leaves_by: how it does so.
        reads_s: seconds that the caller takes after each item.
        via: the endpoint.
        kind: the name under which it is counted.
        hedge_after_s: seconds after which a second instance is asked too (unary ones only); None for not at all.
        cancel_after_s: seconds after which the reading task is cancelled; None for never.
        directly: with `direct`, to an instance that is known then.
        priority: as of every call.
    """

    work: Work
    at_s: float = 0.0
    idempotent: bool = False
    timeout_s: float | None = None
    leaves_after: int | None = None
    leaves_by: Leave = Leave.BREAK
    reads_s: float = 0.0
    via: str = ENDPOINT
    kind: str = ""
    hedge_after_s: float | None = None
    cancel_after_s: float | None = None
    directly: bool = False
    priority: int = 0

    @property
    def resume(self) -> bool:
        """Whether the call is made with `resume=True`."""
        return self.work.shape == Shape.CHECKPOINTED

    @property
    def moves(self) -> bool:
        """Whether it goes to another instance where the first has not begun it."""
        return not self.directly and self.work.shape != Shape.TWO_WAY

    @property
    def once(self) -> bool:
        """Whether at most one handler may ever begin it."""
        return not (self.idempotent or self.resume)


class Journal(Protocol):
    """Where handlers write down what they did; what a killed worker has written must still be there."""

    def began(self, request_id: int) -> None:
        """A handler begins this request, or goes on with it."""


def filling(request_id: int, index: int, size: int) -> bytes:
    """Bytes that differ between requests, items and places in an item, so that none can stand in for another."""
    word = b"%x.%x." % (request_id, index)
    return (word * (size // len(word) + 1))[:size]


def handler(journal: Journal) -> Callable[[Work, Any], AsyncIterator[Any]]:
    """Return the handler that workers of a run serve."""

    async def answer(request: Work, context: Any) -> AsyncIterator[Any]:
        journal.began(request.id)
        if request.wait_s:
            await asyncio.sleep(request.wait_s)
        for index in range(context.resume_token or 0, request.items):
            if request.pause_s and index:
                await asyncio.sleep(request.pause_s)
            if request.shape == Shape.CHECKPOINTED and index % 3 == 2:
                context.checkpoint(index + 1)
            yield request.item(index)
        if request.shape == Shape.ERROR:
            raise LookupError(f"as request {request.id} asks for")

    return answer


def plain(journal: Journal) -> Callable[[Work], Iterator[Any]]:
    """Return a handler that answers the same from a thread."""

    def answer(request: Work) -> Iterator[Any]:
        journal.began(request.id)
        for index in range(request.items):
            yield request.item(index)

    return answer


def relay(onward: Client) -> Callable[[Work], AsyncIterator[Any]]:
    """Return a handler that passes on what another one answers."""

    async def answer(request: Work) -> AsyncIterator[Any]:
        async for item in onward.generate(request, annotated=False):
            yield item

    return answer


def echo(journal: Journal) -> Callable[[AsyncIterator[Work], Any], AsyncIterator[Any]]:
    """Return the handler that answers the requests of a `TWO_WAY` call one by one."""

    async def answer(requests: AsyncIterator[Work], context: Any) -> AsyncIterator[Any]:
        async for request in requests:
            if not request.part:
                journal.began(request.id)
            if request.pause_s:
                await asyncio.sleep(request.pause_s)
            yield request.item(request.part)

    return answer


@dataclass(frozen=True, slots=True)
class Variety:
    """What calls there are beside the simplest ones.

    Attributes:
        largest: bytes of filling in the largest items.
        two_way: calls that stream requests are among them, for an endpoint that serves `echo`.
        cancels: the chance that the reading task is cancelled.
        directly: the chance that a call goes to one instance by its id.
        priorities: calls have any of a few.
        waits: some handlers take a while before their first item.
    """

    largest: int = 2**20
    two_way: bool = False
    cancels: float = 0.0
    directly: float = 0.0
    priorities: bool = False
    waits: bool = False


def plans(
    seed: int, *, duration_s: float, calls_per_s: float, patience_s: float = 20.0, variety: Variety = Variety()
) -> list[Plan]:
    """Draw the calls of a run, in the order of their time: the same arguments give the same calls.

    Args:
        seed: any int.
        duration_s: seconds in which they begin, evenly spaced.
        calls_per_s: how many begin in a second.
        patience_s: the deadline of a call that has a long one, which is half of them; the others have none, but for a
            few whose short one is meant to be missed at times.
        variety: what calls there are.
    """
    rng = random.Random(f"calls {seed}")
    count = int(duration_s * calls_per_s)
    return [_plan(rng, number, number / calls_per_s, patience_s, variety) for number in range(count)]


def _plan(rng: random.Random, number: int, at_s: float, patience_s: float, variety: Variety) -> Plan:
    shapes = [Shape.UNARY, Shape.UNARY, Shape.STREAM, Shape.CHECKPOINTED, Shape.ERROR]
    shape = rng.choice([*shapes, Shape.TWO_WAY] if variety.two_way else shapes)
    items = 1 if shape == Shape.UNARY else int(rng.expovariate(1 / 12))
    work = Work(number, shape, items, _size(rng, variety.largest), rng.choice([0.0, 0.0, 0.002, 0.02]))
    if variety.waits:
        work = msgspec.structs.replace(work, wait_s=rng.choice([0.0, 0.0, 0.02, 0.1]))
    idempotent = rng.random() < 0.5 and shape != Shape.TWO_WAY
    directly = rng.random() < variety.directly
    hedged = shape == Shape.UNARY and idempotent and not directly and rng.random() < 0.3
    return Plan(
        work,
        at_s,
        via=TWO_WAY if shape == Shape.TWO_WAY else ENDPOINT,
        idempotent=idempotent,
        timeout_s=rng.choice([None, None, None, patience_s, patience_s, patience_s, patience_s, 0.03]),
        leaves_after=int(rng.random() * (items + 1)) if shape != Shape.UNARY and rng.random() < 0.15 else None,
        hedge_after_s=0.05 if hedged else None,
        cancel_after_s=rng.random() ** 3 * 0.5 if rng.random() < variety.cancels else None,
        directly=directly,
        priority=rng.choice([-1, 0, 0, 1]) if variety.priorities else 0,
    )


def _size(rng: random.Random, largest: int) -> int:
    """Mostly small: evenly spread over the powers of two, one in ten above 4 KiB."""
    low, high = (0, 12) if rng.random() < 0.9 else (12, 20)
    return min(largest, int(2 ** (low + rng.random() * (high - low))))
