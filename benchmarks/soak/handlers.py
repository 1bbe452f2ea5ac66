"""What the soak's workers serve. Every answer follows from its request, so that a client can check each item."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import Any

from triton_distributed.runtime import Client, Context

NAMESPACE, COMPONENT = "soak", "work"
BATCH = 10  # items between two pauses of a handler that takes its time
CHECKPOINT = 7  # items between two tokens of a stream that can go on elsewhere


def word(number: int, size: int) -> str:
    """A text of `size` characters that no other number has, from four characters on."""
    piece = f"{number:x}."
    return (piece * (size // len(piece) + 1))[:size]


def number(i: int, size: int) -> dict[str, Any]:
    """An item of `numbers`."""
    return {"i": i, "t": word(i, size)}


class Alive:
    """Counts the handlers that run: `with` around each of them."""

    def __init__(self) -> None:
        self.count = 0

    def __enter__(self) -> None:
        self.count += 1

    def __exit__(self, *exception: object) -> None:
        self.count -= 1


@dataclass
class Point:
    """A request whose fields are checked."""

    x: int
    y: int


class Planned(Exception):
    """What a handler raises because the request asks for it."""


ERRORS: dict[str, type[Exception]] = {"KeyError": KeyError, "OSError": OSError, "Planned": Planned}


def handlers(instance_id: int, onward: Callable[[], Client]) -> tuple[Alive, dict[str, tuple[Any, dict[str, int]]]]:
    """The handlers by endpoint, each with its limits, and what counts those that run.

    Args:
        instance_id: of the worker, which `facts` tells.
        onward: returns the worker's own client of `numbers`, through which `relay` goes.
    """
    alive = Alive()

    async def facts(request: Any) -> Any:
        with alive:
            return {"asked": request, "by": instance_id}

    async def numbers(request: dict[str, Any]) -> AsyncIterator[Any]:
        with alive:
            first, count, size, pause_s = request["first"], request["count"], request["size"], request["pause_s"]
            for i in range(first, first + count):
                if pause_s and i % BATCH == 0:
                    await asyncio.sleep(pause_s)
                yield number(i, size)

    def plain(request: dict[str, Any]) -> Iterator[Any]:
        # in a thread: nothing to count, for a generator that nobody reads any more ends with its thread's turn
        for i in range(request["first"], request["first"] + request["count"]):
            yield number(i, request["size"])

    async def arrays(request: dict[str, Any]) -> AsyncIterator[Any]:
        with alive:
            for turn in range(request["times"]):
                yield {"turn": turn, "array": request["array"] ^ turn}

    async def both(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
        with alive:
            async for each in requests:
                yield number(each["i"], each["size"])

    async def failing(request: dict[str, Any]) -> AsyncIterator[Any]:
        with alive:
            for i in range(request["after"]):
                yield i
            raise ERRORS[request["type"]](request["words"])

    async def typed(request: Point) -> int:
        with alive:
            return request.x * request.y

    async def sleepy(request: dict[str, Any]) -> Any:
        with alive:
            await asyncio.sleep(request["s"])
            return request["n"]

    async def steps(request: dict[str, Any], context: Context) -> AsyncIterator[Any]:
        with alive:
            begin = 0 if context.resume_token is None else context.resume_token
            for i in range(begin, request["count"]):
                if i % BATCH == 0:
                    await asyncio.sleep(request["pause_s"])
                if i % CHECKPOINT == 0:
                    context.checkpoint(i + 1)
                yield number(i, request["size"])

    async def narrow(request: dict[str, Any]) -> Any:
        with alive:
            await asyncio.sleep(0.005)
            return request["n"]

    async def relay(request: dict[str, Any]) -> AsyncIterator[Any]:
        with alive:
            async for item in onward().generate(request, annotated=False):
                yield item

    free: dict[str, int] = {}
    served = {
        each.__name__: (each, free) for each in (facts, numbers, arrays, both, failing, typed, sleepy, steps, relay)
    }
    return alive, {**served, "plain": (plain, free), "narrow": (narrow, {"max_inflight": 2, "max_queue": 4})}


async def coming(request: Any) -> Any:
    """Of an endpoint that comes and goes while its worker stays."""
    return request
