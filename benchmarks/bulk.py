"""`python -m benchmarks.bulk [--rounds N] [--tcp]`: large messages on the socket, and small calls beside them.

- fan-out: one client sends 200 MB to each of four workers, one after another and all at once
- fan-in: four clients send 200 MB to one worker, one after another and all at once
- beside: one 1-item call after another without load, and on the same session while tensors of 1 GiB are under way, in
  either direction

GB/s counts each array once. CPU is that of all processes that take part. A ratio compares figures of one round. Before
each measurement the memory that it needs is touched, so that none waits until a virtual machine gets it from its host.
"""

from __future__ import annotations

import argparse
import asyncio
import mmap
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import numpy as np
import uvloop

from benchmarks.rounds import RESULTS, Figures, Measure, Run
from benchmarks.workloads import quantile
from harness.processes import Child, answer_questions
from triton_distributed.runtime import Client, DistributedRuntime

SIDES = 4  # The workers of fan-out, and the clients of fan-in.
ARRAY_BYTES = 200_000_000
TENSOR_BYTES = 1 << 30
CALLS = 1_000  # The least number of small calls for one p99.


async def take(request: Any) -> AsyncIterator[Any]:
    """Take an array, and yield its size."""
    yield request.nbytes


async def give(request: int) -> AsyncIterator[Any]:
    """Yield an array of the size that was asked for."""
    yield np.zeros(request, np.uint8)


async def one(request: Any) -> AsyncIterator[Any]:
    """Yield one small item."""
    yield {"i": 0, "t": "tok"}


async def worker(number: str) -> None:
    """Serve the handlers in component `number`."""
    component = DistributedRuntime().namespace("bench").component(f"bulk{number}")
    await component.create_service()
    serving = [
        asyncio.ensure_future(component.endpoint(each.__name__).serve_endpoint(each)) for each in (take, give, one)
    ]

    async def answer(question: str) -> float:
        return time.process_time()  # the only question: cpu

    await answer_questions(answer)
    assert serving
    os._exit(0)


class Caller:
    """A client process."""

    def __init__(self) -> None:
        self._runtime = DistributedRuntime()
        self._clients: dict[str, Client] = {}
        self._array = np.arange(ARRAY_BYTES // 4, dtype=np.float32)

    async def _client(self, path: str) -> Client:
        if path not in self._clients:
            client = self._clients[path] = await self._runtime.endpoint(f"bench.{path}").client()
            await client.wait_for_instances()
        return self._clients[path]

    async def _send(self, number: int, array: Any) -> None:
        client = await self._client(f"bulk{number}.take")
        size = await client.call(array)
        if size != array.nbytes:
            raise RuntimeError(f"{size} bytes arrived, not {array.nbytes}")

    async def send(self, workers: int, at_once: bool) -> float:
        """Send the array to the first `workers` workers. Return the seconds that it took."""
        started = time.perf_counter()
        if at_once:
            await asyncio.gather(*(self._send(number, self._array) for number in range(workers)))
        else:
            for number in range(workers):
                await self._send(number, self._array)
        return time.perf_counter() - started

    async def _receive(self) -> None:
        client = await self._client("bulk0.give")
        tensor = await client.call(TENSOR_BYTES)
        if tensor.nbytes != TENSOR_BYTES:
            raise RuntimeError(f"{tensor.nbytes} bytes arrived, not {TENSOR_BYTES}")

    async def beside(self, load: str) -> dict[str, float]:
        """Make one call after another while tensors are sent (`take`), received (`give`), or neither is.

        Returns:
            the calls' p50_us and p99_us, and gb_per_s of the tensors.
        """
        client = await self._client("bulk0.one")
        tensor = np.ones(TENSOR_BYTES if load == "take" else 0, np.uint8)
        moved, enough, clock = 0, False, time.perf_counter

        async def move() -> float:
            nonlocal moved
            started = clock()
            while load and not enough:
                await (self._send(0, tensor) if load == "take" else self._receive())
                moved += 1
            return clock() - started

        moving = asyncio.ensure_future(move())
        taken: list[float] = []
        while len(taken) < CALLS or (load and not moved and not moving.done()):
            started = clock()
            await client.call({"n": 1})
            taken.append(clock() - started)
        enough = True
        seconds = await moving
        return {
            "p50_us": quantile(taken, 0.5) * 1e6,
            "p99_us": quantile(taken, 0.99) * 1e6,
            "gb_per_s": moved * TENSOR_BYTES / seconds / 1e9,
        }

    async def answer(self, question: str, **arguments: Any) -> Any:
        """Answer a question of the parent process."""
        if question == "cpu":
            return time.process_time()
        return await (self.send(**arguments) if question == "send" else self.beside(**arguments))


async def caller() -> None:
    await answer_questions(Caller().answer)
    os._exit(0)


async def cpu_s(children: list[Child]) -> float:
    """Return the seconds of CPU that these processes have used."""
    used: list[float] = [await child.ask("cpu") for child in children]
    return sum(used)


def touch(size: int) -> None:
    """Write to `size` bytes of memory and give them back: a virtual machine first has to get memory from its host."""
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
        for at in range(0, size, mmap.PAGESIZE):
            memory[at] = 1


class Processes:
    """Four workers and four callers, whom the measurements below share."""

    def __init__(self, workers: list[Child], callers: list[Child]) -> None:
        self._workers, self._callers = workers, callers

    async def many(self, send: Callable[[bool], Awaitable[Any]]) -> Figures:
        """Send the array four times, in turn and at once."""
        walls, cpus = [], []
        for at_once in (False, True):
            touch(2 * SIDES * ARRAY_BYTES)
            cpu, started = await cpu_s(self._workers + self._callers), time.perf_counter()
            await send(at_once)
            walls.append(time.perf_counter() - started)
            cpus.append(await cpu_s(self._workers + self._callers) - cpu)
        return {
            "in_turn_gb_per_s": SIDES * ARRAY_BYTES / walls[0] / 1e9,
            "at_once_gb_per_s": SIDES * ARRAY_BYTES / walls[1] / 1e9,
            "in_turn_cpu_s": cpus[0],
            "at_once_cpu_s": cpus[1],
            "at_once_over_in_turn": walls[1] / walls[0],
            "cpu_at_once_over_in_turn": cpus[1] / cpus[0],
        }

    async def fan_out(self) -> Figures:
        """One client sends to four workers."""
        return await self.many(lambda at_once: self._callers[0].ask("send", workers=SIDES, at_once=at_once))

    async def fan_in(self) -> Figures:
        """Four clients send to one worker."""

        async def send(at_once: bool) -> None:
            sends = [each.ask("send", workers=1, at_once=True) for each in self._callers]
            if at_once:
                await asyncio.gather(*sends)
            else:
                for each in sends:
                    await each

        return await self.many(send)

    async def beside(self) -> Figures:
        """Make small calls on a session that carries nothing else, and beside tensors in either direction."""
        quiet = await self._callers[0].ask("beside", load="")
        figures = {"quiet_p50_us": quiet["p50_us"], "quiet_p99_us": quiet["p99_us"]}
        for load, name in (("take", "sent"), ("give", "received")):
            touch(2 * TENSOR_BYTES)
            loaded = await self._callers[0].ask("beside", load=load)
            figures |= {f"{name}_{key}": value for key, value in loaded.items()}
            figures[f"{name}_p99_over_quiet"] = loaded["p99_us"] / quiet["p99_us"]
        return figures


async def run(rounds: int, environ: dict[str, str]) -> Run:
    """Measure in rounds; the first one is not counted."""
    async with AsyncExitStack() as stack:
        workers, callers = [], []
        for number in range(SIDES):
            workers.append(await Child.start("benchmarks.bulk", "worker", str(number), environ=environ))
            stack.push_async_callback(workers[-1].stop)
        for _ in range(SIDES):
            callers.append(await Child.start("benchmarks.bulk", "caller", environ=environ))
            stack.push_async_callback(callers[-1].stop)
        processes = Processes(workers, callers)
        measures: dict[tuple[str, str], Measure] = {
            (each.__name__, "ours"): each for each in (processes.fan_out, processes.fan_in, processes.beside)
        }
        await Run().interleave(1, measures)
        counted = Run()
        await counted.interleave(rounds, measures)
    return counted


def main() -> None:
    """Run the benchmark, or one of its processes."""
    if sys.argv[1:2] == ["worker"]:
        uvloop.run(worker(sys.argv[2]))
        return
    if sys.argv[1:2] == ["caller"]:
        uvloop.run(caller())
        return
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bulk", description="Large messages on the socket")
    parser.add_argument("--rounds", type=int, default=5, help="rounds over all of it (5)")
    parser.add_argument("--tcp", action="store_true", help="over TCP on the loopback, not over a Unix socket")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="trb", dir="/tmp" if os.path.isdir("/tmp") else None) as directory:
        environ = {"TRD_DIR": directory, "TRD_SHARED_MEMORY_BYTES": "0"} | (
            {"TRD_LISTEN": "tcp://127.0.0.1:0"} if arguments.tcp else {}
        )
        done = asyncio.run(run(arguments.rounds, environ))
    result = done.write(
        RESULTS / "bulk.json",
        rounds=arguments.rounds,
        quick=False,
        tcp=arguments.tcp,
        array_bytes=ARRAY_BYTES,
        tensor_bytes=TENSOR_BYTES,
    )
    print("| work | figure | median | lowest | highest |\n| --- | --- | --: | --: | --: |")
    for work, peers in result["figures"].items():
        for figure, (median, lowest, highest) in peers["ours"].items():
            print(f"| {work} | {figure} | {median:,.4g} | {lowest:,.4g} | {highest:,.4g} |")


if __name__ == "__main__":
    main()
