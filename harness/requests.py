"""The requests of a chaos run and the handlers that answer them. Every item depends only on its request."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

import msgspec

from triton_distributed.runtime import Client

# The endpoints that workers serve: `handler`, `echo`, `plain` and `relay`.
ENDPOINT, TWO_WAY = "chaos.worker.answer", "chaos.worker.echo"
PLAIN, RELAY = "chaos.worker.plain", "chaos.worker.relay"


class Shape(StrEnum):
    """The kind of answer that a request asks for."""

    UNARY = "unary"
    """One item."""
    STREAM = "stream"
    """Several items."""
    CHECKPOINTED = "checkpointed"
    """Several items, with a resume token at every third one; called with `resume=True`."""
    ERROR = "error"
    """Several items, then a `LookupError`."""
    TWO_WAY = "two-way"
    """The caller streams as many requests as it wants items, to the handler `echo`."""


class Work(msgspec.Struct, frozen=True):
    """The request that travels to the handler.

    Attributes:
        id: the request's id, unique in a run.
        shape: the kind of answer.
        items: the number of items.
        size: bytes of filling in each item.
        pause_s: seconds between items.
        part: the index of this request, if the caller streams requests.
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
        """Return item number `index`: the request's id, the index, and filling that is unique to the item."""
        return [self.id, index, filling(self.id, index, self.size)]


class Leave(StrEnum):
    """How a caller leaves a call."""

    BREAK = "break"
    """It stops reading after `Plan.leaves_after` items; if that is 0, it closes the stream before the first item."""
    CANCEL = "cancel"
    """It cancels the call before the request is sent."""
    DROP = "drop"
    """It drops the call without reading."""
    KILL = "kill"
    """It kills the context after `Plan.leaves_after` items."""


@dataclass(frozen=True, slots=True)
class Plan:
    """One call: its request and its options.

    Attributes:
        work: the request.
        at_s: when the call is made, seconds after the beginning.
        idempotent: another instance may get the request as long as there is no answer.
        timeout_s: seconds that the call may take; None for no limit.
        leaves_after: items after which the caller stops reading; None if it reads to the end.
        leaves_by: how the caller leaves.
        reads_s: seconds that the caller takes after each item.
        via: the endpoint.
        kind: the name under which the call is counted.
        hedge_after_s: seconds after which a second instance gets the request too (unary calls only); None for never.
        cancel_after_s: seconds after which the reading task is cancelled; None for never.
        directly: the call is made with `direct`, to an instance that is known at that time.
        priority: the call's priority.
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
        """Whether the call goes to another instance if the first one has not begun it."""
        return not self.directly and self.work.shape != Shape.TWO_WAY

    @property
    def once(self) -> bool:
        """Whether at most one handler may begin the request."""
        return not (self.idempotent or self.resume)


class Journal(Protocol):
    """Records which requests handlers began. Entries must survive when their worker is killed."""

    def began(self, request_id: int) -> None:
        """Record that a handler begins or continues a request."""


def filling(request_id: int, index: int, size: int) -> bytes:
    """Return bytes that differ between requests, items and positions in an item, so that any mix-up is detected."""
    word = b"%x.%x." % (request_id, index)
    return (word * (size // len(word) + 1))[:size]


def handler(journal: Journal) -> Callable[[Work, Any], AsyncIterator[Any]]:
    """Return the handler that streams its answer."""

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
    """Return a plain handler that gives the same answers from a thread."""

    def answer(request: Work) -> Iterator[Any]:
        journal.began(request.id)
        for index in range(request.items):
            yield request.item(index)

    return answer


def relay(onward: Client) -> Callable[[Work], AsyncIterator[Any]]:
    """Return a handler that passes on the answer of another endpoint."""

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
    """The kinds of calls in a run besides the simplest ones.

    Attributes:
        largest: bytes of filling in the largest items.
        two_way: some calls stream requests, to an endpoint that serves `echo`.
        cancels: the chance that the reading task is cancelled.
        directly: the chance that a call goes to one instance by its id.
        priorities: calls have one of a few priorities.
        waits: some handlers wait for a while before their first item.
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
        duration_s: seconds in which calls begin, evenly spaced.
        calls_per_s: the number of calls that begin in a second.
        patience_s: the timeout of half of the calls. The others have none, except a few with a short timeout that is
            sometimes exceeded on purpose.
        variety: the kinds of calls.
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
    """Draw a size, mostly a small one: evenly spread over the powers of two, one in ten above 4 KiB."""
    low, high = (0, 12) if rng.random() < 0.9 else (12, 20)
    return min(largest, int(2 ** (low + rng.random() * (high - low))))
