"""`python -m benchmarks.sync_client [--rounds N]`: what a call costs from code without an event loop; prints a table.

One process calls a worker with the asynchronous client, the synchronous one, and two other ways to wait for a loop in
a thread. A round takes some calls of each, so that a slow minute of the machine affects all alike.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import queue
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import triton_distributed as trd
from harness.processes import ROOT, environment_without_settings
from triton_distributed.config import Config
from triton_distributed.system.event_loop import new_event_loop

CALLS = 300  # of each kind in a round
ITEMS = 50_000
THREADS, THREAD_CALLS = 16, 200
ECHO = trd.Unary[int, int]("bench.sync.echo")
COUNT = trd.Stream[int, int]("bench.sync.count")


@trd.serve(ECHO)
async def echo(request: int) -> int:
    return request


@trd.serve(COUNT)
async def count(request: int) -> AsyncIterator[int]:
    for number in range(request):
        yield number


def timed(times: list[float], call: Callable[[], Any]) -> None:
    for _ in range(CALLS):
        begun = time.perf_counter()
        call()
        times.append(1e6 * (time.perf_counter() - begun))


class Measurement:
    """The clients of one process, and what was measured with them."""

    def __init__(self, config: Config) -> None:
        self.runner = asyncio.Runner(loop_factory=new_event_loop)  # The asynchronous client runs in this thread.
        self.here = self.runner.run(self._connected(config))
        self.sync = trd.connect_sync(config)
        self.loop = new_event_loop()  # The other ways use a loop in a thread, as the synchronous client does.
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        self.there = self.by_future(self._connected(config))
        self.times: dict[str, list[float]] = {}
        self.rates: dict[str, list[float]] = {}

    @staticmethod
    async def _connected(config: Config) -> trd.Connection:
        here = trd.connect(config)
        await here.wait_for_instances(ECHO, timeout=30)
        return here

    def by_future(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result()

    def by_queue(self) -> Any:
        answers: queue.SimpleQueue[Any] = queue.SimpleQueue()

        async def work() -> None:
            answers.put(await self.there.call(ECHO, 1))

        self.loop.call_soon_threadsafe(self.loop.create_task, work())
        return answers.get()

    async def _alone(self, times: list[float]) -> None:
        for _ in range(CALLS):
            begun = time.perf_counter()
            await self.here.call(ECHO, 1)
            times.append(1e6 * (time.perf_counter() - begun))

    async def _items(self) -> None:
        async for _ in self.here.stream(COUNT, ITEMS):
            pass

    def round(self) -> None:
        times = self.times.setdefault
        self.runner.run(self._alone(times("asynchronous client", [])))
        timed(times("connect_sync", []), lambda: self.sync.call(ECHO, 1))
        timed(times("run_coroutine_threadsafe(…).result()", []), lambda: self.by_future(self.there.call(ECHO, 1)))
        timed(times("queue.SimpleQueue", []), self.by_queue)
        self._rate("items/s, asynchronous client", ITEMS, lambda: self.runner.run(self._items()))
        self._rate("items/s, connect_sync", ITEMS, lambda: [None for _ in self.sync.stream(COUNT, ITEMS)])
        self._rate(f"calls/s, {THREADS} threads, connect_sync", THREADS * THREAD_CALLS, self._in_threads)

    def _rate(self, name: str, number: int, work: Callable[[], object]) -> None:
        begun = time.perf_counter()
        work()
        self.rates.setdefault(name, []).append(number / (time.perf_counter() - begun))

    def _in_threads(self) -> None:
        def calls() -> None:
            for _ in range(THREAD_CALLS):
                self.sync.call(ECHO, 1)

        threads = [threading.Thread(target=calls) for _ in range(THREADS)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()

    def close(self) -> None:
        self.sync.close()
        self.by_future(self.there.close())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()
        self.runner.run(self.here.close())
        self.runner.close()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sync_client", description="The synchronous client")
    parser.add_argument("--rounds", type=int, default=20, help="rounds over all ways to call (20)")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        trd.run(echo, count)
        return
    with tempfile.TemporaryDirectory(prefix="trb", dir="/tmp" if os.path.isdir("/tmp") else None) as directory:
        command = [sys.executable, "-m", "benchmarks.sync_client", "--worker"]
        environ = {**environment_without_settings(), "TRD_DIR": directory}
        worker = subprocess.Popen(command, cwd=ROOT, env=environ, stdout=subprocess.DEVNULL)
        try:
            measurement = Measurement(Config(directory=Path(directory)))
            for _ in range(arguments.rounds):
                measurement.round()
            measurement.close()
        finally:
            worker.terminate()
            worker.wait()
    base = statistics.median(measurement.times["asynchronous client"])
    print("| one call at a time | p50, µs | over the asynchronous client, µs |")
    print("| --- | --: | --: |")
    for name, times in measurement.times.items():
        middle = statistics.median(times)
        print(f"| {name} | {middle:,.0f} | {middle - base:,.0f} |")
    print("\n| rate | median of rounds |\n| --- | --: |")
    for name, rates in measurement.rates.items():
        print(f"| {name} | {statistics.median(rates):,.0f} |")


if __name__ == "__main__":
    main()
