"""Clients that leave: how long until the engine has stopped their work."""

from __future__ import annotations

import asyncio
import random
from typing import Any

from harness.llm.client import Caller, Chat
from harness.llm.stage import Stage, staged
from harness.report import Found, percentile

LIMIT_MS = 10.0
LONG = 900  # Tokens: 90 s, more than any answer gets. The blocks of "engine queue" have room for 1,024.
PROMPT_TOKENS = 35  # Of a chat.
HELD = 8  # Requests that run while the others wait in the queue.
ROUTING = "least_loaded"  # `kv` would hold most of the long prefills in the front end.
# Where the work of a request is when its client leaves, and the options of the engine that keep it there.
PLACES: dict[str, dict[str, Any]] = {
    "decode": {"slots": 1000, "itl_ms": 100},
    "prefill": {"slots": 1000, "batch_tokens": 1_000_000, "itl_ms": 100},
    "engine queue": {"slots": 1000, "blocks": 16, "itl_ms": 100},  # Room for 16 of them.
    "queue": {"slots": HELD, "itl_ms": 100, "queue": "100000"},
}


async def disconnects(settings: dict[str, str], streams: int, seconds: float) -> Found:
    """Let clients leave at random moments, in each place, with streams and with whole answers.

    Args:
        settings: of the processes.
        streams: clients of each place and kind.
        seconds: the time over which they leave.
    """
    found = Found()
    for place, options in PLACES.items():
        async with staged(settings, ROUTING) as stage:
            if place == "prefill":  # One step computes the prompts of nearly all: it must last for all who leave.
                options = {**options, "prefill_token_ms": 1000 * (seconds + 3) / (0.8 * PROMPT_TOKENS * streams)}
            await stage.start_worker("w0", stamped=True, **options)
            await stage.listed("mock")
            await stage.all([Chat(0, 1, False), Chat(1, 1, True)])  # What the first request starts is nothing left.
            for stream in (True, False):
                name = f"{place}, {'stream' if stream else 'whole'}"
                times, words = await _leave(stage, place, stream, streams, seconds)
                found.words += [f"{name}: {each}" for each in words]
                figures = {f"p{share}_ms": percentile(times, share / 100) for share in (50, 90, 99)}
                found.figures[name] = {"left": len(times), **figures, "max_ms": max(times, default=0.0)}
                p99 = figures["p99_ms"]
                kept = p99 <= LIMIT_MS and len(times) == streams
                found.promise(
                    f"{name}: 99 % of the engine's work ends within {LIMIT_MS:g} ms",
                    kept,
                    f"p99 {p99:.1f} ms of {len(times)}",
                )
                found.promise(f"{name}: nothing is left or computed afterwards", not words, f"{len(words)} things")
    return found


async def _leave(stage: Stage, place: str, stream: bool, count: int, seconds: float) -> tuple[list[float], list[str]]:
    """Return the times until the work of each client had ended, ms, and what was wrong."""
    worker = stage.fleet.processes["w0"]
    before = await stage.quiet()
    await worker.ask("stamps")
    held = [await Caller.connect(stage.url) for _ in range(HELD if place == "queue" else 0)]
    for number, each in enumerate(held):
        each.send(Chat(-1 - number, LONG, False))
    if held:
        await _running(stage, len(held))
    callers = [await Caller.connect(stage.url) for _ in range(count)]
    for number, each in enumerate(callers):
        each.send(Chat(number, LONG, stream))
    if place == "decode" and stream:
        await asyncio.gather(*(each.first() for each in callers))
    await _running(stage, count + len(held), "waiting" if place == "prefill" else "")
    left: dict[int, float] = {}
    rng = random.Random(count)

    async def leave(number: int) -> None:
        await asyncio.sleep(rng.uniform(0, seconds))
        left[number] = callers[number].leave(reset=number % 2 == 0)

    await asyncio.gather(*(leave(number) for number in range(count)))
    await asyncio.sleep(0.5)
    stamps = await worker.ask("stamps")
    for each in held:
        each.leave(reset=True)
    words = await stage.left(before, 2 * seconds + 10)
    if place == "queue":
        began = [number for number in stamps["began"] if int(number) >= 0]
        words += [f"the engine began with {len(began)} requests of clients that had left"] if began else []
        ended = stamps["unqueued"]
        times = [1000 * (end - at) for at, end in zip(sorted(left.values()), sorted(ended), strict=False)]
    else:
        freed = stamps["freed"]
        times = [1000 * (freed[str(number)] - at) for number, at in left.items() if str(number) in freed]
    if len(times) != count:
        words.append(f"the work of {count - len(times)} clients had not ended 0.5 s after they left")
    return times, words


async def _running(stage: Stage, count: int, none: str = "") -> None:
    """Wait until the worker has this many requests, and none of them is in this state."""
    worker = stage.fleet.processes["w0"]
    async with asyncio.timeout(30):
        while sum((state := await worker.ask("requests")).values()) < count or state.get(none):
            await asyncio.sleep(0.02)
