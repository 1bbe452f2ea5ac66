"""The handlers that every peer serves: the same functions, so that only the transport differs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

Handler = Callable[[Any], AsyncIterator[Any]]
Call = Callable[[Any], Any]  # Returns something for `async for`.

INTERVAL_S = 0.010  # The interval of the paced streams.
TOKENS = [i * 251 % 128_000 for i in range(512)]  # The numbers of a vocabulary of 128,000: most take 3 bytes.
_forever = asyncio.Event()


async def tokens(request: Any) -> AsyncIterator[Any]:
    """`n` small items, as fast as the peer takes them."""
    for i in range(request["n"]):
        yield {"i": i, "t": "tok"}


async def paced(request: Any) -> AsyncIterator[Any]:
    """`n` items, one every 10 ms after an offset of `phase` seconds. `t` is when the item was due (perf_counter)."""
    due = time.perf_counter() + request["phase"]
    for i in range(request["n"]):
        due += INTERVAL_S
        await asyncio.sleep(due - time.perf_counter())
        yield {"i": i, "t": due}


async def echo(request: Any) -> AsyncIterator[Any]:
    """The request itself."""
    yield request


async def chunks(request: Any) -> AsyncIterator[Any]:
    """The text of the request in `n` parts, as a language model streams one."""
    text, number = request["text"], request["n"]
    size = len(text) // number
    for i in range(number):
        yield {"i": i, "t": text[i * size : (i + 1) * size]}


async def lists(request: Any) -> AsyncIterator[Any]:
    """`n` lists of 512 token numbers."""
    for _ in range(request["n"]):
        yield TOKENS


async def idle(request: Any) -> AsyncIterator[Any]:
    """One item, then nothing for ever."""
    yield {"i": 0, "t": "tok"}
    await _forever.wait()


WORK: dict[str, Handler] = {each.__name__: each for each in (tokens, paced, echo, chunks, lists, idle)}


def relay(call: Call) -> Handler:
    """A handler that passes on the items of another one."""

    async def relay(request: Any) -> AsyncIterator[Any]:
        async for item in call(request):
            yield item

    return relay


def passing_relay(call: Call) -> Handler:
    """As `relay`, for ours: the stream is returned, so that its items are passed on as they came."""

    async def relay(request: Any) -> Any:
        return call(request)

    return relay  # type: ignore[return-value]


def cancelling_relay(call: Call) -> Handler:
    """As `relay`, for grpc.aio: its call continues when its `async for` is left, and must be cancelled explicitly."""

    async def relay(request: Any) -> AsyncIterator[Any]:
        stream = call(request)
        try:
            async for item in stream:
                yield item
        finally:
            stream.cancel()

    return relay


def innermost(ended: asyncio.Queue[float]) -> Handler:
    """A handler that yields once, waits, and notes the time of its `finally` (perf_counter, seconds)."""

    async def innermost(request: Any) -> AsyncIterator[Any]:
        try:
            yield request
            await _forever.wait()
        finally:
            ended.put_nowait(time.perf_counter())

    return innermost
