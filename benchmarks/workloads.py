"""The workloads, seen from the client's side. Each takes its sizes and returns figures by name.

CPU is the user and system time of all threads of client and worker. At first every workload runs for a moment without
being counted, so that connections, caches and the interpreter's specialisation are warm.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from benchmarks.handlers import INTERVAL_S, Call
from benchmarks.peers import Peer
from harness.processes import Child, ChildFailed
from harness.vitals import open_descriptors, resident_bytes

Figures = dict[str, float]
WARM_UP_SHARE = 0.25
OPENING = 256  # The number of idle streams that are opened at the same time.


@dataclass
class Pair:
    """This process as the client, and its worker (the innermost one of a chain)."""

    peer: Peer
    worker: Child

    async def cpu_s(self) -> float:
        """Return the seconds of CPU that both processes have used so far."""
        worker: float = await self.worker.ask("cpu")
        return worker + time.process_time()


def quantile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that is at least as large as `share` of the values (nearest rank)."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


async def _callers(call: Call, concurrent: int, items: int, seconds: float) -> tuple[list[float], float]:
    """Call again and again until the time is over. Return each call's seconds, and the seconds of the whole."""
    latencies: list[float] = []
    request = {"n": items}
    clock = time.perf_counter
    started = clock()
    over = started + seconds

    async def caller() -> None:
        now = clock()
        while now < over:
            count = 0
            async for _ in call(request):
                count += 1
            if count != items:
                raise ChildFailed(f"{count} items came, {items} were asked for")
            before, now = now, clock()
            latencies.append(now - before)

    await asyncio.gather(*(caller() for _ in range(concurrent)))
    return latencies, clock() - started


async def _repeat(pair: Pair, concurrent: int, items: int, seconds: float) -> tuple[list[float], Figures]:
    call = await pair.peer.connect("work", "tokens")
    await _callers(call, concurrent, items, seconds * WARM_UP_SHARE)
    cpu = await pair.cpu_s()
    latencies, wall = await _callers(call, concurrent, items, seconds)
    cpu = await pair.cpu_s() - cpu
    done = len(latencies) * items
    return latencies, {"per_s": done / wall, "cpu_us": cpu / done * 1e6}


async def alone(pair: Pair, seconds: float) -> Figures:
    """One call at a time, one item each."""
    latencies, figures = await _repeat(pair, 1, 1, seconds)
    return {"p50_us": quantile(latencies, 0.5) * 1e6, "p99_us": quantile(latencies, 0.99) * 1e6, **figures}


async def concurrent(pair: Pair, seconds: float) -> Figures:
    """64 callers at once, one item a call."""
    return (await _repeat(pair, 64, 1, seconds))[1]


async def streams(pair: Pair, seconds: float) -> Figures:
    """16 callers at once, 500 items a call."""
    return (await _repeat(pair, 16, 500, seconds))[1]


async def paced(pair: Pair, seconds: float) -> Figures:
    """256 streams at once with an item every 10 ms and evenly spread phases: how late the items arrive."""
    call = await pair.peer.connect("work", "paced")
    number = 256

    async def listen(phase: float, count: int) -> list[float]:
        return [time.perf_counter() - item["t"] async for item in call({"n": count, "phase": phase})]

    async def all_of(count: int) -> list[float]:
        streams = await asyncio.gather(*(listen(INTERVAL_S * k / number, count) for k in range(number)))
        late = list(chain.from_iterable(streams))
        if len(late) != number * count:
            raise ChildFailed(f"{len(late)} items came of {number * count}")
        return late

    count = max(10, round(seconds / INTERVAL_S))
    await all_of(round(count * WARM_UP_SHARE))
    cpu = await pair.cpu_s()
    late = await all_of(count)
    cpu = await pair.cpu_s() - cpu
    return {
        "p50_ms": quantile(late, 0.5) * 1e3,
        "p99_ms": quantile(late, 0.99) * 1e3,
        "cpu_us": cpu / len(late) * 1e6,
    }


async def array(pair: Pair, seconds: float) -> Figures:
    """A 16 MiB float32 array to the worker and back, one at a time. The rate counts its bytes once for a round trip."""
    call = await pair.peer.connect("work", "echo")
    sent = np.arange(4 << 20, dtype=np.float32)

    async def round_trips(seconds: float) -> tuple[int, float]:
        count, passed, started = 0, 0.0, time.perf_counter()
        while passed < seconds or count < 3:
            got = None
            async for item in call(sent):
                got = item
            if got is None or got.dtype != np.float32 or got.shape != sent.shape or got[-1] != sent[-1]:
                raise ChildFailed("another array came back")
            count += 1
            passed = time.perf_counter() - started
        return count, passed

    await round_trips(seconds * WARM_UP_SHARE)
    cpu = await pair.cpu_s()
    count, wall = await round_trips(seconds)
    cpu = await pair.cpu_s() - cpu
    return {"gb_per_s": count * sent.nbytes / wall / 1e9, "cpu_ms": cpu / count * 1e3}


async def idle(pair: Pair, number: int) -> Figures:
    """`number` streams over one connection that wait after their first item: resident bytes per stream and side."""
    tokens = await pair.peer.connect("work", "tokens")
    call = await pair.peer.connect("work", "idle")
    await _callers(tokens, OPENING, 1, 0.1)
    held: list[Any] = []

    async def open_one() -> None:
        stream = call({})
        iterator = aiter(stream)
        await anext(iterator)
        held.extend((stream, iterator))

    async def open_some(count: int) -> None:
        for opened in range(0, count, OPENING):
            await asyncio.gather(*(open_one() for _ in range(min(OPENING, count - opened))))

    await open_some(OPENING)
    gc.collect()
    descriptors, ours, theirs = open_descriptors(), resident_bytes(), await pair.worker.ask("memory")
    await open_some(number)
    gc.collect()
    ours, theirs = resident_bytes() - ours, await pair.worker.ask("memory") - theirs
    return {
        "client_bytes": ours / number,
        "worker_bytes": theirs / number,
        "streams": number,
        "descriptors": open_descriptors() - descriptors,
    }


async def cancel(pair: Pair, number: int, leaving: bool) -> Figures:
    """Three hops, each in its own process: the time from leaving a stream to the `finally` of the innermost handler.

    A stream is left by cancelling the task that waits for the next item. With `leaving`, every other stream is left by
    a `break` out of its `async for` instead.
    """
    call = await pair.peer.connect("first", "hop")
    delays: list[float] = []
    loop = asyncio.get_running_loop()

    async def listen(leave: bool, arrived: asyncio.Future[float]) -> None:
        async for _ in call({}):
            arrived.set_result(time.perf_counter())
            if leave:
                return

    for i in range(-20, number):
        arrived: asyncio.Future[float] = loop.create_future()
        leave = leaving and i % 2 == 0
        task = asyncio.ensure_future(listen(leave, arrived))
        started = await arrived
        if not leave:
            started = time.perf_counter()
            task.cancel()
        await asyncio.wait([task])
        ended: float = await pair.worker.ask("ended")
        if i >= 0:
            delays.append((ended - started) * 1e3)
    return {"p50_ms": quantile(delays, 0.5), "p99_ms": quantile(delays, 0.99), "max_ms": max(delays)}


WORKLOADS: dict[str, Callable[..., Awaitable[Figures]]] = {
    each.__name__: each for each in (alone, concurrent, streams, paced, array, idle, cancel)
}
