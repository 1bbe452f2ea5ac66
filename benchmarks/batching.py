"""Dynamic batching: `python -m benchmarks.batching`. Ends with status 1 if a target is missed.

64 clients of one process call a model in another, each again as soon as it has its answer. The model runs one batch at
a time, in a thread: 5 ms for the batch and 0.05 ms for each request in it. Rounds with batching and without alternate.
The bound of p99 is the delay and two batches, each as long as 99 % of the batches took: a busy machine wakes threads
late.

The own cost is the CPU of one request in `batched`, without a network: the same no-op handler, 64 calls at a time, with
the decorator and without.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import uvloop

import triton_distributed as trd
from harness.processes import Child, answer_questions

CLIENTS = 64
MAX_SIZE, MAX_WAIT_S = 32, 0.005
BATCH_S, REQUEST_S = 0.005, 0.00005
WARM_S = 0.3  # Seconds of each round that are not counted.
MIN_RATIO = 5.0
MAX_COST_US = 15.0
COST_ROUNDS, COST_CALLS = 7, 300  # Rounds, and gathers of 64 calls in each.

_model = threading.Lock()
_batches_s: list[float] = []  # How long the batches took, with the model locked.


def run_model(requests: list[int]) -> list[int]:
    with _model:
        begin = time.perf_counter()
        time.sleep(BATCH_S + REQUEST_S * len(requests))
        if len(requests) > 1:
            _batches_s.append(time.perf_counter() - begin)
    return [request + 1 for request in requests]


@trd.serve("bench.batching.batched")
@trd.batched(max_size=MAX_SIZE, max_wait_s=MAX_WAIT_S)
def batched(requests: list[int]) -> list[int]:
    return run_model(requests)


@trd.serve("bench.batching.single")
def single(request: int) -> int:
    return run_model([request])[0]


async def worker() -> None:
    async with trd.connect() as here:
        await here.serve(batched)
        await here.serve(single)

        async def answer(question: str) -> Any:
            return batched.statistics().mean_size, sorted(_batches_s)[int(len(_batches_s) * 0.99)]

        await answer_questions(answer)


async def measure(here: trd.Connection, endpoint: str, seconds: float) -> tuple[float, list[float]]:
    """Answers per second, and the time of each call in seconds."""
    times: list[float] = []
    begin = time.perf_counter() + WARM_S
    end = begin + seconds

    async def client(number: int) -> None:
        while (sent := time.perf_counter()) < end:
            assert await here.call(endpoint, number) == number + 1
            if sent >= begin:
                times.append(time.perf_counter() - sent)

    await asyncio.gather(*map(client, range(CLIENTS)))
    return len(times) / (time.perf_counter() - begin), sorted(times)


async def noop(request: int, context: trd.Context | None = None) -> int:
    return request


@trd.batched(max_size=MAX_SIZE)
async def noop_batched(requests: list[int]) -> list[int]:
    return requests


async def cost_us(handler: Callable[[int], Awaitable[int]]) -> float:
    """Microseconds of CPU for one call of a handler."""

    async def call(number: int) -> None:
        await handler(number)

    begin = time.process_time()
    for _ in range(COST_CALLS):
        await asyncio.gather(*map(call, range(CLIENTS)))
    return (time.process_time() - begin) / (COST_CALLS * CLIENTS) * 1e6


async def run(rounds: int, seconds: float, directory: Path) -> bool:
    os.environ["TRD_DIR"] = str(directory)
    child = await Child.start("benchmarks.batching", "worker", environ={"TRD_DIR": str(directory)})
    taken: dict[str, list[tuple[float, list[float]]]] = {"batched": [], "single": []}
    try:
        async with trd.connect() as here:
            for _ in range(rounds):
                for name, figures in taken.items():
                    figures.append(await measure(here, f"bench.batching.{name}", seconds))
        mean_size, batch_s = await child.ask("batches")
    finally:
        await child.stop()
    costs = [(await cost_us(noop_batched), await cost_us(noop)) for _ in range(COST_ROUNDS)]
    print("| 64 clients | answers/s | p50 ms | p99 ms |")
    print("| --- | --- | --- | --- |")
    rate, p99 = dict[str, float](), dict[str, float]()
    for name, figures in taken.items():
        rate[name] = statistics.median(each for each, _ in figures)
        p50, p99[name] = (
            statistics.median(times[int(len(times) * share)] for _, times in figures) for share in (0.5, 0.99)
        )
        print(f"| {name} | {rate[name]:,.0f} | {p50 * 1e3:.1f} | {p99[name] * 1e3:.1f} |")
    ratio = statistics.median(a / b for (a, _), (b, _) in zip(taken["batched"], taken["single"], strict=True))
    cost = statistics.median(each - plain for each, plain in costs)
    bound_s = MAX_WAIT_S + 2 * batch_s
    results = [
        (f"throughput, batched ÷ single: {ratio:.1f} (at least {MIN_RATIO:g})", ratio >= MIN_RATIO),
        (f"p99: {p99['batched'] * 1e3:.1f} ms (at most {bound_s * 1e3:.1f})", p99["batched"] <= bound_s),
        (f"own cost: {cost:.1f} µs of CPU a request (at most {MAX_COST_US:g})", cost <= MAX_COST_US),
    ]
    print(f"\nmean size of a batch: {mean_size:.1f}; load average {os.getloadavg()[0]:.1f}")
    for words, good in results:
        print(f"{words}: {'passed' if good else 'MISSED'}")
    return all(good for _, good in results)


def main() -> int:
    if sys.argv[1:] == ["worker"]:
        uvloop.run(worker())
        return 0
    parser = argparse.ArgumentParser(prog="python -m benchmarks.batching", description="Dynamic batching")
    parser.add_argument("--rounds", type=int, default=5, help="rounds with batching and without (5)")
    parser.add_argument("--seconds", type=float, default=2.0, help="seconds of each (2)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="trb", dir="/tmp" if os.path.isdir("/tmp") else None) as directory:
        return 0 if uvloop.run(run(arguments.rounds, arguments.seconds, Path(directory))) else 1


if __name__ == "__main__":
    raise SystemExit(main())
