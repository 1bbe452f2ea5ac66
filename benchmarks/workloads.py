"""The workloads, seen from the client's side. Each takes its sizes and returns figures by name.

`cpu_us` is the user and system time of all threads of all processes of the measurement, for each call or item.
`peak_mib` is the sum of the peaks of their resident memory. At first every workload runs for a moment without being
counted, so that connections, caches and the interpreter's specialisation are warm.
"""

from __future__ import annotations

import asyncio
import gc
import gzip
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from http.client import HTTPConnection
from itertools import chain
from typing import Any, Protocol
from urllib.parse import urlsplit

import numpy as np

from benchmarks.handlers import INTERVAL_S, TOKENS, Call
from benchmarks.peers import Peer
from harness.processes import Child, ChildFailed
from harness.usage import Usage, descendants
from harness.vitals import open_descriptors, resident_bytes

Figures = dict[str, float]
WARM_UP_SHARE = 0.25
OPENING = 256  # The most streams that are opened at the same time for the warm-up, and for the idle streams.


class Worker(Protocol):
    """What serves the handlers: a child, or a process of the peer's own."""

    async def ask(self, question: str) -> Any:
        """Return its answer."""


@dataclass
class Pair:
    """This process as the client, and its workers: one, or a chain, whose innermost is the first of the list."""

    peer: Peer
    workers: Sequence[Worker]

    @property
    def worker(self) -> Worker:
        """The worker that has the handler itself."""
        return self.workers[0]

    def usage(self) -> Usage:
        """Begin to count what this process, the workers and a server that the peer has started use."""
        pid = os.getpid()
        children = (worker.process.pid for worker in self.workers if isinstance(worker, Child))
        return Usage({pid, *children, *descendants(pid)})


def costs(usage: Usage, done: int) -> Figures:
    """Return the CPU for each of `done` calls or items, µs, and the peak of the memory, MiB, if it is known."""
    figures, peak = {"cpu_us": usage.cpu_s() / done * 1e6}, usage.peak_mib()
    return figures if peak is None else {**figures, "peak_mib": peak}


def quantile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that is at least as large as `share` of the values (nearest rank)."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


@dataclass
class Caller:
    """A request that is sent again and again, and the number of items of its answer."""

    call: Call
    request: Any
    items: int
    last: Any = None  # The last item of an answer.

    async def run(self, concurrent: int, seconds: float) -> tuple[list[float], float]:
        """Call from `concurrent` tasks until the time is over. Return each call's seconds, and those of the whole."""
        latencies: list[float] = []
        clock = time.perf_counter
        started = clock()
        over = started + seconds

        async def caller() -> None:
            now = clock()
            while True:
                count, last = 0, None
                async for last in self.call(self.request):  # noqa: B007
                    count += 1
                if count != self.items:
                    raise ChildFailed(f"{count} items came, {self.items} were asked for")
                before, now = now, clock()
                latencies.append(now - before)
                if now >= over:
                    self.last = last
                    return

        await asyncio.gather(*(caller() for _ in range(concurrent)))
        return latencies, clock() - started

    async def measure(self, pair: Pair, concurrent: int, seconds: float) -> tuple[list[float], Figures]:
        """Warm up, then measure: each call's seconds, and the rate and the costs of an item."""
        await self.run(min(concurrent, OPENING), seconds * WARM_UP_SHARE)
        usage = pair.usage()
        latencies, wall = await self.run(concurrent, seconds)
        done = len(latencies) * self.items
        return latencies, {"per_s": done / wall, **costs(usage, done)}


async def tokens_of(pair: Pair, items: int, service: str = "work") -> Caller:
    """Return a caller for `items` small items."""
    return Caller(await pair.peer.connect(service, "tokens"), {"n": items}, items)


async def alone(pair: Pair, seconds: float) -> Figures:
    """One call at a time, one item each."""
    latencies, figures = await (await tokens_of(pair, 1)).measure(pair, 1, seconds)
    return {"p50_us": quantile(latencies, 0.5) * 1e6, "p99_us": quantile(latencies, 0.99) * 1e6, **figures}


async def concurrent(pair: Pair, seconds: float) -> Figures:
    """64 callers at once, one item a call."""
    return (await (await tokens_of(pair, 1)).measure(pair, 64, seconds))[1]


async def streams(pair: Pair, seconds: float) -> Figures:
    """16 callers at once, 500 items a call."""
    return (await (await tokens_of(pair, 500)).measure(pair, 16, seconds))[1]


async def sweep(pair: Pair, seconds: float, streams: int, items: int) -> Figures:
    """`streams` callers at once, `items` items a call."""
    return (await (await tokens_of(pair, items)).measure(pair, streams, seconds))[1]


async def chunks(pair: Pair, seconds: float) -> Figures:
    """16 callers at once. A request carries 10,000 characters, and the answer brings them back in 50 parts."""
    text = "0123456789" * 1_000
    caller = Caller(await pair.peer.connect("work", "chunks"), {"text": text, "n": 50}, 50)
    latencies, figures = await caller.measure(pair, 16, seconds)
    if caller.last != {"i": 49, "t": text[-200:]}:
        raise ChildFailed("another text came back")
    return {"p50_us": quantile(latencies, 0.5) * 1e6, **figures}


async def lists(pair: Pair, seconds: float) -> Figures:
    """16 callers at once, 100 lists of 512 token numbers a call."""
    caller = Caller(await pair.peer.connect("work", "lists"), {"n": 100}, 100)
    _, figures = await caller.measure(pair, 16, seconds)
    if caller.last != TOKENS:
        raise ChildFailed("another list came back")
    return figures


async def unary(pair: Pair, seconds: float) -> Figures:
    """1,000,000 bytes to the worker and back, one call at a time."""
    sent = bytes(range(250)) * 4_000
    caller = Caller(await pair.peer.connect("work", "echo"), sent, 1)
    latencies, figures = await caller.measure(pair, 1, seconds)
    if caller.last != sent:
        raise ChildFailed("other bytes came back")
    return {"p50_us": quantile(latencies, 0.5) * 1e6, **figures}


async def pipeline(pair: Pair, seconds: float) -> Figures:
    """16 callers at once, 500 items a call, through three workers, and from the last of them directly.

    `over_one_stage` is the CPU of an item through three workers divided by that of one which comes directly.
    """
    _, one = await (await tokens_of(pair, 500, "third")).measure(pair, 16, seconds / 2)
    _, three = await (await tokens_of(pair, 500, "first")).measure(pair, 16, seconds / 2)
    return {**three, "one_stage_cpu_us": one["cpu_us"], "over_one_stage": three["cpu_us"] / one["cpu_us"]}


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
    usage = pair.usage()
    late = await all_of(count)
    return {
        "p50_ms": quantile(late, 0.5) * 1e3,
        "p99_ms": quantile(late, 0.99) * 1e3,
        **costs(usage, len(late)),
    }


async def array(pair: Pair, seconds: float, mib: int, least: int = 3) -> Figures:
    """A float32 array of `mib` MiB to the worker and back, one at a time, for `seconds` and at least `least` times.

    The rate counts the array's bytes once for a round trip.
    """
    sent = np.arange(mib << 18, dtype=np.float32)
    call = await pair.peer.connect("work", "echo")

    async def round_trips(seconds: float, least: int) -> tuple[int, float]:
        count, passed, started = 0, 0.0, time.perf_counter()
        while passed < seconds or count < least:
            got = None  # The last array's memory is free before the next one arrives.
            async for got in call(sent):  # noqa: B007
                pass
            if got is None or got.dtype != np.float32 or got.shape != sent.shape or got[-1] != sent[-1]:
                raise ChildFailed("another array came back")
            count += 1
            passed = time.perf_counter() - started
        return count, passed

    await round_trips(seconds * WARM_UP_SHARE, 1)
    usage = pair.usage()
    count, wall = await round_trips(seconds, least)
    return {"gb_per_s": count * sent.nbytes / wall / 1e9, **costs(usage, count)}


async def idle(pair: Pair, number: int) -> Figures:
    """`number` streams over one connection that wait after their first item: resident bytes per stream and side.

    `descriptors` are those that the streams added to client and worker. The CPU is that of opening a stream.
    """
    call = await pair.peer.connect("work", "idle")
    await (await tokens_of(pair, 1)).run(OPENING, 0.1)
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
    before, there_before = (resident_bytes(), open_descriptors()), await pair.worker.ask("held")
    usage = pair.usage()
    await open_some(number)
    figures = costs(usage, number)
    gc.collect()
    after, there = (resident_bytes(), open_descriptors()), await pair.worker.ask("held")
    return {
        "client_bytes": (after[0] - before[0]) / number,
        "worker_bytes": (there[0] - there_before[0]) / number,
        "streams": number,
        "descriptors": after[1] - before[1] + there[1] - there_before[1],
        **figures,
    }


async def scrape(pair: Pair, number: int, scrapes: int) -> Figures:
    """Metrics over HTTP while `number` streams are open and the worker's loop turns without a break.

    Each figure is the median of all scrapes. `stall_ms` is the longest time during a scrape in which the loop did not
    turn, and `quiet_ms` the longest in an equal time without a scrape. On a busy machine both are the machine's;
    `computed_ms` is the longest that the worker's other threads computed between two turns. `scrape_ms` is the time of
    a scrape, `page_kib` the size of its page.
    """
    call = await pair.peer.connect("work", "idle")
    held = []
    for opened in range(0, number, OPENING):
        some = [aiter(call({})) for _ in range(min(OPENING, number - opened))]
        await asyncio.gather(*(anext(each) for each in some))
        held += some
    url = urlsplit(await pair.worker.ask("status url"))

    def fetch() -> int:
        connection = HTTPConnection(url.netloc)
        try:
            connection.request("GET", "/metrics", headers={"Accept-Encoding": "gzip"})
            page = gzip.decompress(connection.getresponse().read())
        finally:
            connection.close()
        if b"triton_streams " not in page:
            raise ChildFailed("the page has no metrics")
        return len(page)

    size = await asyncio.to_thread(fetch)  # It imports prometheus-client.
    taken, stalls, computed, quiet = [], [], [], []
    for _ in range(scrapes):
        started = time.perf_counter()
        await pair.worker.ask("turn")
        await asyncio.to_thread(fetch)
        stalled_s, computed_s = await pair.worker.ask("longest turn")
        stalls.append(stalled_s)
        computed.append(computed_s)
        taken.append(time.perf_counter() - started)
        await pair.worker.ask("turn")
        await asyncio.sleep(taken[-1])
        quiet.append((await pair.worker.ask("longest turn"))[0])
    return {
        "stall_ms": quantile(stalls, 0.5) * 1e3,
        "quiet_ms": quantile(quiet, 0.5) * 1e3,
        "computed_ms": quantile(computed, 0.5) * 1e3,
        "scrape_ms": quantile(taken, 0.5) * 1e3,
        "page_kib": size / 1024,
        "streams": len(held),
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

    usage = pair.usage()
    for i in range(-20, number):
        if i == 0:
            usage = pair.usage()  # The first calls warm up.
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
    return {
        "p50_ms": quantile(delays, 0.5),
        "p99_ms": quantile(delays, 0.99),
        "max_ms": max(delays),
        **costs(usage, number),
    }


WORKLOADS: dict[str, Callable[..., Awaitable[Figures]]] = {
    each.__name__: each
    for each in (alone, concurrent, streams, sweep, chunks, lists, unary, paced, array, pipeline, idle, scrape, cancel)
}
