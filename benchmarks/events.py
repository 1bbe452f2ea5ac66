"""`python -m benchmarks.events [--rounds N]`: compares the event planes and prints a table.

It needs the NATS client and a NATS server, which `make test` installs. One process publishes and one subscribes, both
on uvloop. CPU is that of these two processes. The NATS server's CPU comes in addition and has its own row.

- burst: events in rounds of 500; a round begins when the last one has arrived, so that no event is dropped
- latency: one event every 2 ms, from before `publish` until the subscriber has the decoded event
- array: one 512 KiB float32 array in each event, in rounds of 4
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
import tempfile
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import numpy as np
import uvloop

from benchmarks.planes import cpu_s
from harness.processes import Child, answer_questions
from triton_distributed.runtime import DistributedRuntime
from triton_distributed.testing import NatsServer

PLANES = {"local": {"TRD_EVENTS": "local"}, "nats": {"TRD_EVENTS": "nats"}}
BURST, ROUND = 10_000, 500
PACED, PAUSE_S = 1_000, 0.002
ARRAYS, ARRAY_ROUND = 200, 4
WARM = 4  # Rounds that are not counted.
SMALL = {"event_id": 17, "block_hashes": [1 << 40, 2 << 40, 3 << 40, 4 << 40], "parent": None, "kind": "stored"}


class Publisher:
    """The publishing process."""

    def __init__(self, runtime: DistributedRuntime) -> None:
        self._component = runtime.namespace("bench").component("events")
        self.subscription = self._component.subscribe("seen")

    async def rounds(self, count: int, size: int, payload: Any) -> dict[str, float]:
        for _ in range(WARM):
            await self._round(size, payload)
        start, cpu = time.perf_counter(), time.process_time()
        for _ in range(count // size):
            await self._round(size, payload)
        return {"wall_s": time.perf_counter() - start, "cpu_s": time.process_time() - cpu}

    async def _round(self, size: int, payload: Any) -> None:
        for _ in range(size - 1):
            await self._component.publish("work", payload)
        await self._component.publish("work", "last of a round")
        await self.subscription.get(30.0)

    async def answer(self, question: str) -> Any:
        if question == "burst":
            return await self.rounds(BURST, ROUND, SMALL)
        if question == "array":
            return await self.rounds(ARRAYS, ARRAY_ROUND, np.zeros(128 * 1024, np.float32))
        for _ in range(PACED):
            await self._component.publish("work", [time.perf_counter_ns(), SMALL])
            await asyncio.sleep(PAUSE_S)
        await self._component.publish("work", "last of a round")
        return (await self.subscription.get(30.0)).data


class Subscriber:
    """The subscribing process."""

    def __init__(self, runtime: DistributedRuntime) -> None:
        self._component = runtime.namespace("bench").component("events")
        self.subscription = self._component.subscribe("work")
        self._reading = asyncio.ensure_future(self._read())

    async def _read(self) -> None:
        taken: list[int] = []
        async for event in self.subscription:
            data = event.data
            if type(data) is list:
                taken.append(time.perf_counter_ns() - data[0])
            elif type(data) is str:
                taken.sort()
                shares = {"p50_us": 0.5, "p99_us": 0.99} if taken else {}
                await self._component.publish(
                    "seen", {name: taken[int(len(taken) * share)] / 1e3 for name, share in shares.items()}
                )
                taken.clear()

    async def answer(self, question: str) -> Any:
        return time.process_time()


async def child(role: str) -> None:
    runtime = DistributedRuntime()
    side = Publisher(runtime) if role == "publisher" else Subscriber(runtime)
    await side.subscription
    await answer_questions(side.answer)
    os._exit(0)


async def run(rounds: int, directory: Path) -> None:
    taken: dict[tuple[str, str], list[float]] = {}
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(NatsServer(environ=os.environ))
        pairs = {}
        for plane, settings in PLANES.items():
            place = directory / plane
            place.mkdir(mode=0o700)
            environ = {"TRD_DIR": str(place), "NATS_SERVER": server.url, **settings}
            pairs[plane] = [
                await Child.start("benchmarks.events", role, environ=environ) for role in ("subscriber", "publisher")
            ]
            for each in pairs[plane]:
                stack.push_async_callback(each.stop)
        for _ in range(rounds):
            for work, count, size in (("burst", BURST, ROUND), ("latency", PACED, 0), ("array", ARRAYS, ARRAY_ROUND)):
                every = count + WARM * size  # The events that the subscriber and the server have seen.
                for plane, (subscriber, publisher) in pairs.items():
                    before, server_before = await subscriber.ask("cpu"), cpu_s(server.pid)
                    answer = await publisher.ask(work)
                    used = await subscriber.ask("cpu") - before
                    figures = {"NATS server, CPU µs an event": (cpu_s(server.pid) - server_before) / every * 1e6}
                    if work == "latency":
                        figures |= {"p50 µs": answer["p50_us"], "p99 µs": answer["p99_us"]}
                    else:
                        figures["events/s"] = count / answer["wall_s"]
                        figures["publisher, CPU µs an event"] = answer["cpu_s"] / count * 1e6
                        figures["subscriber, CPU µs an event"] = used / every * 1e6
                    for name, value in figures.items():
                        taken.setdefault((f"{work}: {name}", plane), []).append(value)
    print("| work |", " | ".join(PLANES), "|")
    print("| --- |", " | ".join("---" for _ in PLANES), "|")
    for name in dict.fromkeys(name for name, _ in taken):
        print(f"| {name} |", " | ".join(f"{statistics.median(taken[name, plane]):,.4g}" for plane in PLANES), "|")


def main() -> None:
    if len(sys.argv) > 1 and sys.argv[1] in ("publisher", "subscriber"):
        uvloop.run(child(sys.argv[1]))
        return
    parser = argparse.ArgumentParser(prog="python -m benchmarks.events", description="Local events beside NATS")
    parser.add_argument("--rounds", type=int, default=5, help="rounds over all work and both planes (5)")
    with tempfile.TemporaryDirectory(prefix="trb", dir="/tmp" if os.path.isdir("/tmp") else None) as directory:
        asyncio.run(run(parser.parse_args().rounds, Path(directory)))


if __name__ == "__main__":
    main()
