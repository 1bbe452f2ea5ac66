"""The requests of a chaos run and the handler that answers them: every item follows from its request alone."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

import msgspec


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


class Work(msgspec.Struct, frozen=True):
    """What travels to the handler.

    Attributes:
        id: of the request, unique in a run.
        shape: what to do.
        items: how many items.
        size: bytes of filling in each.
        pause_s: seconds between items.
    """

    id: int
    shape: str
    items: int
    size: int = 0
    pause_s: float = 0.0

    def item(self, index: int) -> list[Any]:
        """Return item number `index`: who it is for, which it is, and filling that nothing else has."""
        return [self.id, index, filling(self.id, index, self.size)]


@dataclass(frozen=True, slots=True)
class Plan:
    """One call: what is asked for, and how.

    Attributes:
        work: the request.
        at_s: seconds after the beginning at which it is made.
        idempotent: a second instance may be asked while nothing was answered.
        timeout_s: seconds that it may take; None for as long as it takes.
        leaves_after: items after which the caller stops reading; None where it reads to the end.
        hedge_after_s: seconds after which a second instance is asked too (unary ones only); None for not at all.
    """

    work: Work
    at_s: float = 0.0
    idempotent: bool = False
    timeout_s: float | None = None
    leaves_after: int | None = None
    hedge_after_s: float | None = None

    @property
    def resume(self) -> bool:
        """Whether the call is made with `resume=True`."""
        return self.work.shape == Shape.CHECKPOINTED

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
        for index in range(context.resume_token or 0, request.items):
            if request.pause_s and index:
                await asyncio.sleep(request.pause_s)
            if request.shape == Shape.CHECKPOINTED and index % 3 == 2:
                context.checkpoint(index + 1)
            yield request.item(index)
        if request.shape == Shape.ERROR:
            raise LookupError(f"as request {request.id} asks for")

    return answer


def plans(seed: int, *, duration_s: float, calls_per_s: float, patience_s: float = 20.0) -> list[Plan]:
    """Draw the calls of a run, in the order of their time: the same arguments give the same calls.

    Args:
        seed: any int.
        duration_s: seconds in which they begin, evenly spaced.
        calls_per_s: how many begin in a second.
        patience_s: the deadline of a call that has a long one, which is half of them; the others have none, but for a
            few whose short one is meant to be missed at times.
    """
    rng = random.Random(f"calls {seed}")
    return [_plan(rng, number, number / calls_per_s, patience_s) for number in range(int(duration_s * calls_per_s))]


def _plan(rng: random.Random, number: int, at_s: float, patience_s: float) -> Plan:
    shape = rng.choice([Shape.UNARY, Shape.UNARY, Shape.STREAM, Shape.CHECKPOINTED, Shape.ERROR])
    items = 1 if shape == Shape.UNARY else int(rng.expovariate(1 / 12))
    size = int(2 ** (rng.random() * 12)) if rng.random() < 0.9 else int(2 ** (12 + rng.random() * 8))
    work = Work(number, shape, items, size, rng.choice([0.0, 0.0, 0.002, 0.02]))
    idempotent = rng.random() < 0.5
    hedged = shape == Shape.UNARY and idempotent and rng.random() < 0.3
    return Plan(
        work,
        at_s,
        idempotent=idempotent,
        timeout_s=rng.choice([None, None, None, patience_s, patience_s, patience_s, patience_s, 0.03]),
        leaves_after=int(rng.random() * (items + 1)) if shape != Shape.UNARY and rng.random() < 0.15 else None,
        hedge_after_s=0.05 if hedged else None,
    )
