"""The client that behaves: `python -m benchmarks.hostile.client CORE`. Calls at a steady pace, and new connections.

Open loop: a call is due whether or not the one before has ended, and its latency counts from when it was due.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from typing import Any

import uvloop

from benchmarks.hostile.raw import WORKER
from benchmarks.memory import open_descriptors, resident_bytes
from benchmarks.processes import answer_questions
from triton_distributed.errors import TritonError
from triton_distributed.runtime import Client, DistributedRuntime

DIAL_EVERY_S = 0.5
BELIEVED = 8  # calls at once to a worker that lies


class Load:
    """One phase's calls and dials."""

    def __init__(self) -> None:
        self.latencies: list[float] = []
        self.dials: list[float] = []
        self.failed: dict[str, int] = {}
        self.lied_to = 0

    async def call(self, client: Client, due: float, number: int) -> None:
        try:
            stream = await client.generate(number, annotated=False)
            if [item async for item in stream] != [number]:
                raise ValueError("a wrong answer")
            self.latencies.append(time.perf_counter() - due)
        except Exception as error:
            self._fail("call", error)

    async def dial(self) -> None:
        """A new client's first call, on a connection of its own."""
        started = time.perf_counter()
        runtime = DistributedRuntime(asyncio.get_running_loop())
        try:
            client = await runtime.endpoint(f"{WORKER}.echo").client()
            await self_test(client)
            self.dials.append(time.perf_counter() - started)
        except Exception as error:
            self._fail("dial", error)
        finally:
            await runtime.close()

    async def believe(self, client: Client, at_once: int) -> None:
        """Call the worker that lies, over and over, some calls at a time; what it says must end as some error."""

        async def one() -> None:
            while True:
                try:
                    stream = await client.generate(1, annotated=False, timeout=1.0)
                    async for _ in stream:
                        self.lied_to += 1
                except (TritonError, ValueError):
                    self.lied_to += 1
                except Exception as error:
                    self._fail("lies", error)
                await asyncio.sleep(0.01)

        await asyncio.gather(*[one() for _ in range(at_once)])

    def _fail(self, what: str, error: Exception) -> None:
        words = f"{what}: {type(error).__name__}: {error}"[:300]
        self.failed[words] = self.failed.get(words, 0) + 1

    def figures(self) -> dict[str, Any]:
        ordered = sorted(self.latencies) or [0.0]
        return {
            "calls": len(self.latencies),
            "p50_ms": 1e3 * ordered[len(ordered) // 2],
            "p99_ms": 1e3 * ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)],
            "max_ms": 1e3 * ordered[-1],
            "dials": len(self.dials),
            "dial_max_ms": 1e3 * max(self.dials, default=0.0),
            "failed": self.failed,
            "lied_to": self.lied_to,
        }


async def self_test(client: Client) -> None:
    """One call that must succeed."""
    if [item async for item in await client.generate(1, annotated=False)] != [1]:
        raise ValueError("a wrong answer")


async def paced(client: Client, seconds: float, rate: float, lies: Client | None = None) -> dict[str, Any]:
    """Call `rate` times a second, dial twice a second, for `seconds`; wait for the last answers."""
    load, loop = Load(), asyncio.get_running_loop()
    running: set[asyncio.Task[None]] = set()
    believing = loop.create_task(load.believe(lies, BELIEVED)) if lies is not None else None
    started = time.perf_counter()
    next_dial = started
    for number in range(int(seconds * rate)):
        due = started + number / rate
        if (wait := due - time.perf_counter()) > 0:
            await asyncio.sleep(wait)
        running.add(loop.create_task(load.call(client, due, number)))
        if due >= next_dial:
            next_dial += DIAL_EVERY_S
            running.add(loop.create_task(load.dial()))
        running = {task for task in running if not task.done()} if not number % 50 else running
    if believing is not None:
        believing.cancel()
        await asyncio.wait([believing])
    if running:
        await asyncio.wait(running, timeout=30)
    unanswered = sum(not task.done() for task in running)
    if unanswered:
        load.failed["unanswered after 30 s"] = unanswered
    return load.figures()


async def main(core: str) -> None:
    if core:
        os.sched_setaffinity(0, {int(core)})
    runtime = DistributedRuntime(asyncio.get_running_loop())
    client = await runtime.endpoint(f"{WORKER}.echo").client()
    await self_test(client)

    lies = await runtime.endpoint(f"{WORKER}.lies").client()

    async def answer(question: str, believe: bool = False, **arguments: Any) -> Any:
        if question == "load":
            return await paced(client, lies=lies if believe else None, **arguments)
        return {"rss": resident_bytes(), "fds": open_descriptors(), "tasks": len(asyncio.all_tasks())}

    await answer_questions(answer)
    os._exit(0)


if __name__ == "__main__":
    uvloop.run(main(*sys.argv[1:]))
